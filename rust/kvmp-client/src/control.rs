//! The session's socket: one message out, one answer in, each within a bound; and the look whether it hung up.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kvmp_core::wire::{ClientMessage, ServerMessage, SocketError, receive, send};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::fork::LocalFd;
use crate::{Bound, ClientError};

/// Longest sleep between two looks at what else may end a wait.
pub(crate) const SLICE: Duration = Duration::from_millis(10);

/// How an exchange over the socket failed.
#[derive(Debug)]
pub(crate) enum ExchangeError {
    Socket(SocketError),
    Interrupted,
}

impl From<SocketError> for ExchangeError {
    fn from(error: SocketError) -> Self {
        Self::Socket(error)
    }
}

/// The socket after the hello. Nonblocking, so that only `poll` ever waits.
#[derive(Debug)]
pub(crate) struct Control {
    socket: LocalFd,
    /// Answers to questions that were given up: they come first.
    stale: Mutex<u32>,
}

impl Control {
    pub fn new(socket: LocalFd) -> Self {
        Self { socket, stale: Mutex::new(0) }
    }

    fn fd(&self) -> Result<BorrowedFd<'_>, SocketError> {
        self.socket.get().ok_or(SocketError::HangUp)
    }

    /// Asks and waits for the answer. A second caller waits its turn beyond its own bound by the first one's at most.
    pub fn exchange(&self, message: &ClientMessage, bound: &Bound<'_>) -> Result<ServerMessage, ExchangeError> {
        let mut stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = self.fd()?;
        wait_for(fd, PollFlags::OUT, bound)?;
        send(fd, message, &[])?;
        *stale += 1;
        loop {
            wait_for(fd, PollFlags::IN, bound)?;
            match receive(fd) {
                Err(SocketError::TimedOut) => {}
                Err(error) => return Err(error.into()),
                Ok((answer, _)) => {
                    *stale -= 1;
                    if *stale == 0 {
                        return Ok(answer);
                    }
                }
            }
        }
    }

    /// Whether the server has closed its end; a look, never a wait.
    pub fn hung_up(&self) -> bool {
        let Ok(fd) = self.fd() else { return false };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(gone)
    }

    /// What a server that hung up said last, where that was a refusal.
    pub fn last_words(&self) -> Option<String> {
        match receive_last(self.fd().ok()?) {
            Ok((ServerMessage::Refused { message, .. }, _)) => Some(message),
            _ => None,
        }
    }

    /// Hangs up; descriptors stay until the session is dropped.
    pub fn shut(&self) {
        if let Ok(fd) = self.fd() {
            // A socket that is gone already is shut.
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        }
    }
}

/// The next message. A server that hung up without having read all leaves an error on the socket, which comes before the
/// message that it sent first: it is told once, so ask twice.
fn receive_last(fd: BorrowedFd<'_>) -> Result<(ServerMessage, Vec<OwnedFd>), SocketError> {
    match receive(fd) {
        Err(SocketError::HangUp) => receive(fd),
        other => other,
    }
}

/// Waits in slices until the socket can do `what`.
fn wait_for(fd: BorrowedFd<'_>, what: PollFlags, bound: &Bound<'_>) -> Result<(), ExchangeError> {
    loop {
        if wait_slice(fd, what, bound.left().min(SLICE))? {
            return Ok(());
        }
        if bound.is_interrupted() {
            return Err(ExchangeError::Interrupted);
        }
        if bound.left().is_zero() {
            return Err(SocketError::TimedOut.into());
        }
    }
}

fn wait_slice(fd: BorrowedFd<'_>, what: PollFlags, slice: Duration) -> Result<bool, SocketError> {
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    let timeout = timespec(slice);
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(false),
        Ok(_) => Ok(true),
        Err(errno) => Err(SocketError::Os(errno)),
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}

/// First exchange: the hello, and the Welcome with its descriptors, registered before any fork can copy them.
pub(crate) fn greet(
    socket: BorrowedFd<'_>,
    hello: &ClientMessage,
    bound: &Bound<'_>,
) -> Result<(ServerMessage, Vec<LocalFd>), ExchangeError> {
    wait_for(socket, PollFlags::OUT, bound)?;
    match send(socket, hello, &[]) {
        // A server that lets nobody of this user in says so before it is asked, and hangs up.
        Ok(()) | Err(SocketError::HangUp) => {}
        Err(error) => return Err(error.into()),
    }
    loop {
        wait_for(socket, PollFlags::IN, bound)?;
        let mut registry = crate::fork::registry();
        match receive_last(socket) {
            Err(SocketError::TimedOut) => {}
            Err(error) => return Err(error.into()),
            Ok((answer, fds)) => {
                return Ok((answer, fds.into_iter().map(|fd| LocalFd::new(fd, &mut registry)).collect()));
            }
        }
    }
}

impl From<ExchangeError> for ClientError {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Interrupted => Self::Interrupted,
            ExchangeError::Socket(source) => Self::Protocol(source.to_string()),
        }
    }
}
