//! What the other threads of the server ask of the data-plane thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};

use kvmp_core::ids::{ChunkId, EngineToken};
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::ring::Ring;
use kvmp_core::wire::{Hello, Opened, Refusal};

/// A session's number, never used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct SessionId(pub u64);

/// Why a client is not given what it asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Refused {
    pub refusal: Refusal,
    pub message: String,
}

/// A refusal and its words.
pub(crate) fn refused(refusal: Refusal, message: impl Into<String>) -> Refused {
    Refused { refusal, message: message.into() }
}

/// How the data-plane thread tells the control thread of sessions it ended: a channel, and an eventfd to poll.
#[derive(Clone)]
pub(crate) struct Faults {
    sender: Sender<(SessionId, String)>,
    bell: Arc<OwnedFd>,
}

impl Faults {
    pub fn new(sender: Sender<(SessionId, String)>, bell: Arc<OwnedFd>) -> Self {
        Self { sender, bell }
    }

    /// Says that a session was ended, and why.
    pub fn tell(&self, session: SessionId, why: String) {
        if self.sender.send((session, why)).is_ok() {
            let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
        }
    }
}

/// A new session.
pub(crate) struct Attach {
    pub session: SessionId,
    pub ring: Ring,
    pub doorbell: OwnedFd,
    pub hello: Hello,
    /// Index of the holder entry that the client keeps locked.
    pub holder: u32,
}

pub(crate) type Reply<T> = SyncSender<Result<T, Refused>>;

/// One request to the data-plane thread.
pub(crate) enum Command {
    Attach {
        attach: Box<Attach>,
        reply: Reply<EngineToken>,
    },
    /// The connection is gone; `fault`: the client did on its socket what it may not.
    Detach {
        session: SessionId,
        fault: bool,
    },
    Open {
        session: SessionId,
        spec: Box<NamespaceSpec>,
        reply: Reply<Box<Opened>>,
    },
    Join {
        session: SessionId,
        namespace: u16,
        digest: String,
        layout: serde_json::Value,
        reply: Reply<Box<Opened>>,
    },
    ChunkBacked(ChunkId),
    BackingEnded,
    Stop,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

/// How other threads reach the data-plane thread: a channel, and an eventfd that wakes it.
#[derive(Clone, Debug)]
pub(crate) struct PlaneHandle {
    commands: Sender<Command>,
    bell: Arc<OwnedFd>,
}

impl PlaneHandle {
    pub fn new(commands: Sender<Command>, bell: Arc<OwnedFd>) -> Self {
        Self { commands, bell }
    }

    /// Sends a command; a thread that is gone needs none.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // A full counter has rung already: the error of that write is no loss.
            let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Sends a command and waits for its answer, which takes no longer than a slice of work.
    pub fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refused> {
        let (reply, answer) = sync_channel(1);
        self.send(command(reply));
        answer.recv().unwrap_or_else(|_| Err(refused(Refusal::ShuttingDown, "the server is stopping")))
    }
}
