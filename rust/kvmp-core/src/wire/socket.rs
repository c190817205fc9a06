//! One message a datagram over a `SOCK_SEQPACKET` unix socket, descriptors beside it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use super::message::{FRAME_BYTES, Frame, FrameError, MAX_BODY};

/// Most descriptors that a message carries.
const MAX_FDS: usize = 8;

/// Why a message did not pass.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    HangUp,
    /// Nothing came (or went) within the socket's time-out.
    #[error("no answer within the time-out")]
    TimedOut,
    /// The system call failed.
    #[error("socket: {0}")]
    Os(Errno),
    /// What came is no message.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::TimedOut,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::HangUp,
            other => Self::Os(other),
        }
    }
}

/// Sends one message with descriptors; never raises SIGPIPE.
pub fn send<M: Serialize>(socket: impl AsFd, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
    let bytes = Frame::encode(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives one message and the descriptors beside it (close-on-exec).
pub fn receive<M: for<'de> Deserialize<'de>>(socket: impl AsFd) -> Result<(M, Vec<OwnedFd>), SocketError> {
    let mut bytes = vec![0; FRAME_BYTES + MAX_BODY];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if got.bytes == 0 {
        return Err(SocketError::HangUp);
    }
    if got.flags.contains(ReturnFlags::TRUNC) {
        return Err(FrameError::Length { said: usize::MAX, found: got.bytes }.into());
    }
    Ok((Frame::decode(&bytes[..got.bytes])?, fds))
}

/// Effective uid and pid of the process at the other end when it connected (or listened); the pid is 0 for a process
/// that this one's pid namespace does not show, as a server outside is to a container (rustix takes that for an error).
pub fn peer_uid(socket: impl AsFd) -> Result<(u32, i32), SocketError> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (fd, option) = (socket.as_fd().as_raw_fd(), (&raw mut credentials).cast());
    // SAFETY: the descriptor is open for the call; `option` and `len` are locals of the size that SO_PEERCRED writes.
    let done = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, option, &raw mut len) };
    if done != 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL).into());
    }
    Ok((credentials.uid, credentials.pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ClientMessage;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_message_and_its_descriptors_pass() {
        let (a, b) = pair();
        send(&a, &ClientMessage::Locate, &[a.as_fd(), b.as_fd()]).unwrap();
        let (message, fds) = receive::<ClientMessage>(&b).unwrap();
        assert_eq!((message, fds.len()), (ClientMessage::Locate, 2));
        assert_eq!(peer_uid(&a).unwrap().0, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn hang_up_rubbish_and_oversize_are_told_apart() {
        let (a, b) = pair();
        rustix::net::send(&a, &[9; 80], SendFlags::empty()).unwrap();
        assert!(matches!(receive::<ClientMessage>(&b), Err(SocketError::Frame(FrameError::NotKvmp(80)))));
        rustix::net::send(&a, &vec![0; FRAME_BYTES + MAX_BODY + 1], SendFlags::empty()).unwrap();
        assert!(matches!(receive::<ClientMessage>(&b), Err(SocketError::Frame(FrameError::Length { .. }))));
        drop(a);
        assert!(matches!(receive::<ClientMessage>(&b), Err(SocketError::HangUp)));
        assert!(matches!(send(&b, &ClientMessage::Locate, &[]), Err(SocketError::HangUp)));
    }
}
