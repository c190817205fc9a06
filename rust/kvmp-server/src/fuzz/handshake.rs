//! Any datagrams on the server's socket, with and without descriptors: each is answered or the connection ends, and the
//! next client is welcome.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use kvmp_core::wire::{ClientMessage, Frame, Hello, Role, ServerMessage, SocketError, receive};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType,
};
use zerocopy::IntoBytes;

use super::bytes::Bytes;
use crate::Server;

/// No answer within this is a server that hangs.
const WATCHDOG: Duration = Duration::from_secs(10);
/// Messages of one input; each takes a round trip.
const MESSAGES: usize = 16;

/// A server to knock at. Its segment has no name, so that an end by a signal leaves none.
pub struct Door {
    server: Server,
    dir: tempfile::TempDir,
}

impl Door {
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("fuzz-{}", std::process::id());
        let builder = Server::builder().size(2 << 20).chunk(2 << 20).name(&name).tcp("off").ephemeral(true);
        let server = builder.socket(&dir.path().join("s")).start().unwrap();
        let _ = std::fs::remove_file(server.segment_path());
        Self { server, dir }
    }

    fn dial(&self) -> OwnedFd {
        let flags = SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        set_socket_timeout(&fd, Timeout::Recv, Some(WATCHDOG)).unwrap();
        set_socket_timeout(&fd, Timeout::Send, Some(WATCHDOG)).unwrap();
        rustix::net::connect(&fd, &SocketAddrUnix::new(self.dir.path().join("s")).unwrap()).unwrap();
        fd
    }
}

impl Default for Door {
    fn default() -> Self {
        Self::new()
    }
}

/// What the server said to each message, in words, for the tests.
pub fn handshake(door: &Door, data: &[u8]) -> Vec<String> {
    let mut input = Bytes::new(data);
    let mut socket = door.dial();
    let mut said = Vec::new();
    while !input.is_empty() && said.len() < MESSAGES {
        let (kind, len) = (input.u8(), usize::from(input.u16()));
        let bytes = message(kind & 7, input.take(len));
        let fds = usize::from(kind >> 3 & 7) * 3;
        let answer = if deliver(&socket, &bytes, fds) { answer(&socket) } else { "hung up".into() };
        if answer == "hung up" {
            socket = door.dial();
        }
        said.push(answer);
    }
    // Half closed, then dropped: whatever it was.
    let _ = rustix::net::shutdown(&socket, Shutdown::Write);
    let next = door.dial();
    assert!(deliver(&next, &Frame::encode(&hello(Role::Tool)).unwrap(), 0));
    assert_eq!(answer(&next), "welcome", "the next client is not served");
    assert!(door.server.is_serving());
    said
}

fn hello(role: Role) -> ClientMessage {
    ClientMessage::Hello(Hello { role, pid: 1, engine_token: None, part: None, dma: false, features: vec![] })
}

/// Bytes as they are, or with more and more of a message's shape round them.
fn message(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let framed = |body: &[u8]| [Frame::new(body.len()).as_bytes(), body].concat();
    let around = |front: &str, back: &str| framed(&[front.as_bytes(), bytes, back.as_bytes()].concat());
    match kind {
        0 => bytes.to_vec(),
        1 => framed(bytes),
        2 => Frame::encode(&hello(Role::Scheduler)).unwrap(),
        3 => around("{\"hello\":{", "}}"),
        4 => around("{\"open\":{\"spec\":{", "}}}"),
        5 => around("{\"join\":{", "}}"),
        6 => around(
            "{\"open\":{\"spec\":{\"model\":\"m\",\"facts\":{},\"parts\":[{\"bytes\":[4096],\"layout\":1}],",
            "}}}",
        ),
        // A front whose fields are the input's.
        _ => {
            let mut whole = framed(bytes);
            for (field, byte) in whole[8..64].iter_mut().zip(bytes) {
                *field ^= byte;
            }
            whole
        }
    }
}

/// Whether the server still listens to this connection.
fn deliver(socket: &OwnedFd, bytes: &[u8], fds: usize) -> bool {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(21))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = vec![socket.as_fd(); fds];
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
}

fn answer(socket: &OwnedFd) -> String {
    match receive::<ServerMessage>(socket) {
        Ok((ServerMessage::Welcome(_), fds)) => {
            assert_eq!(fds.len(), 4);
            "welcome".into()
        }
        Ok((ServerMessage::Opened(opened), _)) => format!("opened {}", opened.digest),
        Ok((ServerMessage::Refused { refusal, message }, _)) => {
            assert!(!message.is_empty());
            format!("refused {refusal:?}: {message}")
        }
        Err(SocketError::HangUp) => "hung up".into(),
        other => panic!("{other:?}"),
    }
}
