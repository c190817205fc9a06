//! The control thread: one poll over the listener and every session's socket.
//!
//! A session: `accepted -> uid checked -> Hello -> Welcome -> (open | join)* -> hang-up`.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use kvmp_core::ids::EngineToken;
use kvmp_core::ring::Ring;
use kvmp_core::segment::{Access, Mapping};
use kvmp_core::wire::{
    ClientMessage, FEATURE_READERS, Geometries, Hello, LOOKUP_MAX, Refusal, Role, ServerMessage, SocketError, Welcome,
    peer_uid, receive, send,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::SocketFlags;

use super::socket::BoundSocket;
use super::watch::{FileWatch, LOOK};
use crate::error::ServerError;
use crate::plane::{Attach, Command, PlaneHandle, Refused, SessionId, refused};
use crate::segment::{HolderLocks, SegmentFile};

/// Optional features of this server.
const FEATURES: [&str; 1] = [FEATURE_READERS];
/// Between two tries to accept while the system has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections accepted before the others have their turn.
const ACCEPTED: usize = 16;
/// How long a connection may take over its hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

/// What the control thread works with.
pub(crate) struct ControlStart {
    pub socket: BoundSocket,
    pub segment: Arc<SegmentFile>,
    pub holders: HolderLocks,
    pub plane: PlaneHandle,
    pub allow_uids: Vec<u32>,
    /// Readable when the thread should stop.
    pub stop: Arc<OwnedFd>,
    /// Told what the server cannot go on after.
    pub fail: Sender<ServerError>,
    /// Sessions that the data plane ended, and why; the descriptor is readable when there are any.
    pub faults: Receiver<(SessionId, String)>,
    pub faults_bell: Arc<OwnedFd>,
}

struct Connection {
    fd: OwnedFd,
    /// Set by Welcome.
    session: Option<SessionId>,
    since: Instant,
}

/// Something to do.
enum Event {
    Listener,
    Faults,
    Connection(u64),
}

/// The control thread's state.
pub(crate) struct Control {
    start: ControlStart,
    connections: HashMap<u64, Connection>,
    next: u64,
    /// Set after an accept that failed: not before then.
    accept_again: Option<Instant>,
    file: FileWatch,
}

/// Descriptors and mapping of a new session.
struct SessionFiles {
    segment: OwnedFd,
    ring: OwnedFd,
    ring_map: Ring,
    doorbell: OwnedFd,
}

fn make_ring() -> io::Result<(OwnedFd, Ring)> {
    let fd = rustix::fs::memfd_create(c"kvmp-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, Ring::BYTES)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let file = std::fs::File::from(fd.try_clone()?);
    Ok((fd, Ring::new(Mapping::new(&file, 0, Ring::BYTES, Access::ReadWrite)?)))
}

impl Control {
    pub fn new(start: ControlStart) -> Self {
        let file = FileWatch::new(Arc::clone(&start.segment));
        Self { start, connections: HashMap::new(), next: 1, accept_again: None, file }
    }

    /// Serves until told to stop.
    pub fn run(mut self) {
        while let Some(ready) = self.wait() {
            for event in ready {
                match event {
                    Event::Listener => self.accept_some(),
                    Event::Faults => self.end_faulted(),
                    Event::Connection(id) => self.serve(id),
                }
            }
            self.drop_silent();
            if let Some(error) = self.file.look() {
                // Its clients see a hang-up before anything else.
                self.connections.clear();
                let _ = self.start.fail.send(error);
                return;
            }
        }
    }

    /// What is readable; `None`: stop.
    fn wait(&self) -> Option<Vec<Event>> {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        let mut events = vec![Event::Faults];
        events.extend(ids.iter().map(|id| Event::Connection(*id)));
        let mut fds =
            vec![PollFd::new(&*self.start.stop, PollFlags::IN), PollFd::new(&*self.start.faults_bell, PollFlags::IN)];
        fds.extend(ids.iter().map(|id| PollFd::new(&self.connections[id].fd, PollFlags::IN)));
        // Without descriptors to accept with, the listener stays readable: leave it out for a while.
        if self.accept_again.is_none_or(|at| Instant::now() >= at) {
            events.push(Event::Listener);
            fds.push(PollFd::new(&self.start.socket.fd, PollFlags::IN));
        }
        match poll(&mut fds, Some(&self.timeout())) {
            Err(rustix::io::Errno::INTR) => return Some(Vec::new()),
            Err(e) => {
                tracing::error!("poll failed: {e}; the server stops");
                return None;
            }
            Ok(_) => {}
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if ready(&fds[0]) {
            return None;
        }
        Some(fds[1..].iter().zip(events).filter(|(fd, _)| ready(fd)).map(|(_, event)| event).collect())
    }

    /// Without an event, something that is over by itself needs a look, and so does the file.
    fn timeout(&self) -> Timespec {
        let waiting = self.accept_again.is_some() || self.connections.values().any(|c| c.session.is_none());
        let pause = if waiting { ACCEPT_PAUSE } else { LOOK };
        Timespec { tv_sec: 0, tv_nsec: pause.as_nanos() as i64 }
    }

    /// Some of those who wait: clients that come without end must not keep the others from being heard.
    fn accept_some(&mut self) {
        self.accept_again = None;
        for _ in 0..ACCEPTED {
            match rustix::net::accept_with(&self.start.socket.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => self.accepted(fd),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(e) => {
                    tracing::warn!("a connection could not be accepted: {e}; trying again");
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn accepted(&mut self, fd: OwnedFd) {
        match self.check_uid(&fd) {
            Ok(()) => {
                let connection = Connection { fd, session: None, since: Instant::now() };
                self.connections.insert(self.next, connection);
                self.next += 1;
            }
            Err(why) => refuse(fd.as_fd(), &why),
        }
    }

    /// Connections that never said hello do not stay.
    fn drop_silent(&mut self) {
        let silent = |c: &Connection| c.session.is_none() && c.since.elapsed() >= HELLO_PATIENCE;
        let ids: Vec<u64> = self.connections.iter().filter(|(_, c)| silent(c)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.close(id, &Why::Fault("it said no hello".into())));
    }

    /// Sessions that the data plane has ended: the client is told why, and sees a hang-up.
    fn end_faulted(&mut self) {
        let _ = rustix::io::read(&*self.start.faults_bell, &mut [0u8; 8]);
        while let Ok((session, why)) = self.start.faults.try_recv() {
            if let Some(connection) = self.connections.get(&session.0) {
                refuse(connection.fd.as_fd(), &refused(Refusal::Protocol, why.clone()));
            }
            // The data plane has said so, and counted it.
            self.close(session.0, &Why::Told(why));
        }
    }

    fn check_uid(&self, fd: &OwnedFd) -> Result<(), Refused> {
        let (uid, pid) = peer_uid(fd).map_err(|e| refused(Refusal::Uid, e.to_string()))?;
        let own = rustix::process::geteuid().as_raw();
        if uid == own || uid == 0 || self.start.allow_uids.contains(&uid) {
            return Ok(());
        }
        tracing::warn!("pid {pid} of uid {uid} refused: this server serves uid {own}; allow it with --allow-uid {uid}");
        Err(refused(
            Refusal::Uid,
            format!("uid {uid} may not use the kvmp server of uid {own}; start it with --allow-uid {uid}"),
        ))
    }

    fn serve(&mut self, id: u64) {
        let Some(connection) = self.connections.get(&id) else { return };
        let outcome = match receive::<ClientMessage>(&connection.fd) {
            Ok((message, fds)) => {
                // Descriptors travel from the server only: whatever came is closed at once.
                drop(fds);
                self.answer(id, message)
            }
            Err(SocketError::TimedOut) => return,
            Err(SocketError::HangUp) => return self.close(id, &Why::HungUp),
            Err(SocketError::Frame(e @ kvmp_core::wire::FrameError::Version { .. })) => {
                Err(refused(Refusal::Version, e.to_string()))
            }
            Err(e) => Err(refused(Refusal::Protocol, e.to_string())),
        };
        if let Err(why) = outcome {
            if let Some(connection) = self.connections.get(&id) {
                refuse(connection.fd.as_fd(), &why);
            }
            // A namespace that is refused leaves the session as it was; all else ends it.
            if !matches!(why.refusal, Refusal::Namespace | Refusal::Full)
                || self.connections.get(&id).is_none_or(|c| c.session.is_none())
            {
                self.close(id, &Why::Fault(why.message));
            } else {
                tracing::info!("session {id}: {}", why.message);
            }
        }
    }

    fn answer(&mut self, id: u64, message: ClientMessage) -> Result<(), Refused> {
        let session = self.connections.get(&id).and_then(|c| c.session);
        match (message, session) {
            (ClientMessage::Hello(hello), None) => self.welcome(id, &hello),
            (ClientMessage::Open { spec }, Some(session)) => {
                let opened = self.start.plane.ask(|reply| Command::Open { session, spec: Box::new(spec), reply })?;
                self.reply(id, &ServerMessage::Opened(*opened))
            }
            (ClientMessage::Join { namespace, digest, layout }, Some(session)) => {
                let opened =
                    self.start.plane.ask(|reply| Command::Join { session, namespace, digest, layout, reply })?;
                self.reply(id, &ServerMessage::Opened(*opened))
            }
            (ClientMessage::Hello(_), Some(_)) => Err(refused(Refusal::Protocol, "a second hello on one connection")),
            (_, None) => Err(refused(Refusal::Protocol, "the first message must be a hello")),
            (ClientMessage::Locate, Some(_)) => Err(refused(Refusal::Protocol, "locate is for the TCP rendezvous")),
        }
    }

    fn reply(&self, id: u64, message: &ServerMessage) -> Result<(), Refused> {
        let Some(connection) = self.connections.get(&id) else { return Ok(()) };
        // A client that does not read its socket loses the session, it cannot make this thread wait.
        send(&connection.fd, message, &[]).map_err(|e| refused(Refusal::Protocol, format!("answering: {e}")))
    }

    fn session_files(&self) -> io::Result<SessionFiles> {
        let (ring, ring_map) = make_ring()?;
        Ok(SessionFiles {
            segment: self.start.segment.reopen(true)?,
            ring,
            ring_map,
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn welcome(&mut self, id: u64, hello: &Hello) -> Result<(), Refused> {
        let files =
            self.session_files().map_err(|e| refused(Refusal::Full, format!("a session cannot be made: {e}")))?;
        let segment = Arc::clone(&self.start.segment);
        let taken = self
            .start
            .holders
            .take(|| segment.reopen(false))
            .map_err(|e| refused(Refusal::Full, format!("a holder entry cannot be locked: {e}")))?;
        let (holder, holder_fd) = taken.ok_or_else(|| refused(Refusal::Full, "all 4,096 holder entries are held"))?;
        self.start.segment.table.set_holder(holder, u64::from(hello.pid), hello.role as u64);
        let session = SessionId(id);
        let doorbell = files.doorbell.try_clone().map_err(|e| refused(Refusal::Full, e.to_string()))?;
        let attach = Attach { session, ring: files.ring_map, doorbell, hello: hello.clone(), holder };
        let token = self.start.plane.ask(|reply| Command::Attach { attach: Box::new(attach), reply })?;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.session = Some(session);
        }
        let welcome = ServerMessage::Welcome(self.welcome_message(session, token, hello)?);
        if let Some(connection) = self.connections.get(&id) {
            let fds: [BorrowedFd<'_>; 4] =
                [files.segment.as_fd(), files.ring.as_fd(), files.doorbell.as_fd(), holder_fd.as_fd()];
            match send(&connection.fd, &welcome, &fds) {
                Ok(()) => {}
                // It gave up on an answer that was long in coming, which is no lie.
                Err(SocketError::HangUp) => {
                    self.close(id, &Why::HungUp);
                    return Ok(());
                }
                Err(e) => return Err(refused(Refusal::Protocol, format!("welcoming: {e}"))),
            }
        }
        let role = match hello.role {
            Role::Scheduler => format!("scheduler of engine {:016x}", token.0),
            Role::Worker => format!("worker {} of engine {:016x}", hello.part.unwrap_or(0), token.0),
            Role::Reader => format!("reader of part {} of engine {:016x}", hello.part.unwrap_or(0), token.0),
            Role::Tool => "tool".into(),
        };
        tracing::debug!("session {id}: pid {}, {role}", hello.pid);
        Ok(())
    }

    fn welcome_message(&self, session: SessionId, token: EngineToken, hello: &Hello) -> Result<Welcome, Refused> {
        let table = &self.start.segment.table;
        let header = table.header().ok_or_else(|| refused(Refusal::Protocol, "the segment's header is unreadable"))?;
        let geometry = table.layout().geometry;
        Ok(Welcome {
            session: session.0,
            server_epoch: header.server_epoch,
            server_version: env!("CARGO_PKG_VERSION").into(),
            engine_token: token.0,
            segment_id: kvmp_core::segment::SegmentId(header.segment_id).to_string(),
            geometry: Geometries { chunk_bytes: geometry.chunk_bytes, chunks: geometry.chunks },
            keys_max: LOOKUP_MAX,
            features: hello.features.iter().filter(|name| FEATURES.contains(&name.as_str())).cloned().collect(),
        })
    }

    fn close(&mut self, id: u64, why: &Why) {
        let Some(connection) = self.connections.remove(&id) else { return };
        let fault = matches!(why, Why::Fault(_));
        match (connection.session, why) {
            (Some(session), _) => {
                if fault {
                    tracing::warn!("session {id} is ended: {why}");
                }
                self.start.plane.send(Command::Detach { session, fault });
            }
            // Also one that hung up: it may be a client that does not trust this server's user.
            (None, _) => tracing::info!("a connection ends before its hello: {why}"),
        }
        tracing::debug!("connection {id} ends: {why}");
    }
}

/// Why a connection ends.
enum Why {
    /// The client closed it, as every client does one day.
    HungUp,
    /// The client did what it may not.
    Fault(String),
    /// The data plane ended the session, and told the log.
    Told(String),
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::HungUp => f.write_str("it hung up"),
            Self::Fault(why) | Self::Told(why) => f.write_str(why),
        }
    }
}

fn refuse(fd: BorrowedFd<'_>, why: &Refused) {
    let message = ServerMessage::Refused { refusal: why.refusal, message: why.message.clone() };
    let _ = send(fd, &message, &[]);
}
