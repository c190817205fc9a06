//! A client without manners: the socket and the four descriptors as they came, no library between.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::ring::{MappedQueue, Producer, Ring, SUBMISSIONS};
use kvmp_core::segment::{Access, Mapping};
use kvmp_core::wire::{ClientMessage, Hello, Role, ServerMessage, SocketError, Submission, receive, send};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

pub struct Raw {
    pub socket: OwnedFd,
    pub segment: OwnedFd,
    pub memory: OwnedFd,
    pub doorbell: OwnedFd,
    pub holder: OwnedFd,
    pub ring: Ring,
    pub submissions: Producer<MappedQueue>,
}

pub fn dial(path: &Path) -> OwnedFd {
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    // A watchdog: no answer ends the test, it does not hang it.
    set_socket_timeout(&fd, Timeout::Recv, Some(Duration::from_secs(20))).unwrap();
    let address = SocketAddrUnix::new(path).unwrap();
    // A full backlog makes it wait, as every client's connect does.
    rustix::io::retry_on_intr(|| rustix::net::connect(&fd, &address)).unwrap();
    fd
}

pub fn hello(role: Role) -> ClientMessage {
    let pid = std::process::id();
    ClientMessage::Hello(Hello { role, pid, engine_token: None, part: None, dma: false, features: vec![] })
}

impl Raw {
    pub fn attach(path: &Path, role: Role) -> Self {
        let socket = dial(path);
        send(&socket, &hello(role), &[]).unwrap();
        Self::welcomed(socket)
    }

    /// After a hello was sent.
    pub fn welcomed(socket: OwnedFd) -> Self {
        let (message, fds) = receive::<ServerMessage>(&socket).unwrap();
        assert!(matches!(message, ServerMessage::Welcome(_)), "{message:?}");
        let [segment, memory, doorbell, holder] = <[OwnedFd; 4]>::try_from(fds).unwrap();
        let file = std::fs::File::from(memory.try_clone().unwrap());
        let ring = Ring::new(Mapping::new(&file, 0, Ring::BYTES, Access::ReadWrite).unwrap());
        let submissions = Producer::new(ring.queue(SUBMISSIONS));
        Self { socket, segment, memory, doorbell, holder, ring, submissions }
    }

    pub fn open(&self, spec: &NamespaceSpec) -> u16 {
        send(&self.socket, &ClientMessage::Open { spec: spec.clone() }, &[]).unwrap();
        match receive::<ServerMessage>(&self.socket).unwrap().0 {
            ServerMessage::Opened(opened) => opened.namespace,
            other => panic!("{other:?}"),
        }
    }

    pub fn knock(&self) {
        rustix::io::write(&self.doorbell, &1u64.to_ne_bytes()).unwrap();
    }

    pub fn submit(&mut self, submission: Submission) {
        self.submissions.push(&submission.to_entry()).unwrap().unwrap();
        self.knock();
    }

    /// The server's last words, where it ends the session.
    pub fn refusal(self) -> String {
        let mut said = None;
        loop {
            match receive::<ServerMessage>(&self.socket) {
                Ok((ServerMessage::Refused { message, .. }, _)) => said = Some(message),
                Ok(_) => {}
                Err(SocketError::HangUp) => return said.unwrap(),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
