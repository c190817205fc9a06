//! One session as the data-plane thread sees it.

use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;

use kvmp_core::ids::{EngineToken, PartId};
use kvmp_core::ring::{COMPLETIONS, Consumer, Corrupt, MappedQueue, Parking, Producer, Ring, SUBMISSIONS};
use kvmp_core::wire::{Completion, Role, Submission};

use super::command::{Attach, SessionId};
use super::serve::Running;

/// Why a session is ended by the server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionFault {
    #[error("its ring makes no sense: {0}")]
    Ring(#[from] Corrupt),
    #[error("it has more requests open than completions fit")]
    Overrun,
    #[error("request {request}: {why}")]
    Malformed { request: u64, why: &'static str },
}

/// Queues, rights and the request being worked on.
pub(crate) struct Session {
    pub id: SessionId,
    pub role: Role,
    pub engine: EngineToken,
    pub part: Option<PartId>,
    pub ring: Ring,
    submissions: Consumer<MappedQueue>,
    completions: Producer<MappedQueue>,
    /// Registered with epoll; closed with the session.
    pub doorbell: OwnedFd,
    /// Namespaces it opened or joined.
    pub namespaces: HashSet<u16>,
    /// A request that is worked on in slices.
    pub running: Option<Running>,
    /// Completions pushed in this round, not yet announced.
    unannounced: bool,
}

impl Session {
    pub fn new(attach: Attach, engine: EngineToken) -> Self {
        let Attach { session: id, ring, doorbell, hello, .. } = attach;
        Self {
            id,
            role: hello.role,
            engine,
            part: hello.part.map(PartId),
            submissions: Consumer::new(ring.queue(SUBMISSIONS)),
            completions: Producer::new(ring.queue(COMPLETIONS)),
            ring,
            doorbell,
            namespaces: HashSet::new(),
            running: None,
            unannounced: false,
        }
    }

    /// Whether there is something to do.
    pub fn is_ready(&mut self) -> bool {
        // A corrupt ring is something to do: ending the session.
        self.running.is_some() || self.submissions.is_ready().unwrap_or(true)
    }

    pub fn next(&mut self) -> Result<Option<Submission>, SessionFault> {
        Ok(self.submissions.pop()?.map(Submission::from_entry))
    }

    pub fn complete(&mut self, completion: &Completion) -> Result<(), SessionFault> {
        self.completions.push(&completion.to_entry())?.map_err(|_| SessionFault::Overrun)?;
        self.unannounced = true;
        Ok(())
    }

    /// Wakes the client if it sleeps and something was completed.
    pub fn announce(&mut self) {
        if std::mem::take(&mut self.unannounced) && Parking(self.ring.client_parked()).must_ring() {
            // The memfd is sealed against shrinking, so the word stays mapped whatever the client does.
            let _ = rustix::thread::futex::wake(self.ring.completion_futex(), rustix::thread::futex::Flags::empty(), 1);
        }
    }
}

/// Sessions in the order in which their turn comes.
pub(crate) type Turns = VecDeque<SessionId>;
