//! Clients that lie, on ring and socket: their session ends with a reason, nobody else notices.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(dead_code, reason = "each test binary uses its share of `support`")]

mod support;

use std::os::fd::OwnedFd;
use std::path::Path;

use kvmp_core::ring::{COMPLETIONS, Consumer, Producer, QueueCells, RING_ENTRIES, Ring, SUBMISSIONS};
use kvmp_core::segment::{Access, Mapping};
use kvmp_core::sync::Ordering;
use kvmp_core::wire::{
    ClientMessage, Code, Completion, Frame, Hello, Op, Refusal, Role, ServerMessage, SocketError, Submission, receive,
    send,
};
use proptest::prelude::*;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use support::{Engine, chain, server, spec, until};

/// A client without manners: the socket, the ring and the doorbell as they came.
struct Raw {
    socket: OwnedFd,
    ring: Ring,
    doorbell: OwnedFd,
    _others: Vec<OwnedFd>,
}

fn dial(path: &Path) -> OwnedFd {
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&fd, &SocketAddrUnix::new(path).unwrap()).unwrap();
    fd
}

fn hello(role: Role, engine_token: Option<u64>, part: Option<u16>) -> ClientMessage {
    ClientMessage::Hello(Hello { role, pid: std::process::id(), engine_token, part, dma: false, features: vec![] })
}

impl Raw {
    fn attach(path: &Path, role: Role) -> Self {
        let socket = dial(path);
        send(&socket, &hello(role, None, None), &[]).unwrap();
        let (message, mut fds) = receive::<ServerMessage>(&socket).unwrap();
        assert!(matches!(message, ServerMessage::Welcome(_)), "{message:?}");
        let ring = std::fs::File::from(fds[1].try_clone().unwrap());
        let ring = Ring::new(Mapping::new(&ring, 0, Ring::BYTES, Access::ReadWrite).unwrap());
        let doorbell = fds.remove(2);
        Self { socket, ring, doorbell, _others: fds }
    }

    fn knock(&self) {
        rustix::io::write(&self.doorbell, &1u64.to_ne_bytes()).unwrap();
    }

    fn submit(&self, submission: Submission) {
        // A fresh producer each time would forget its position; these tests push once.
        Producer::new(self.ring.queue(SUBMISSIONS)).push(&submission.to_entry()).unwrap().unwrap();
        self.knock();
    }

    fn answer(&self) -> Completion {
        let mut completions = Consumer::new(self.ring.queue(COMPLETIONS));
        let mut got = None;
        until("an answer", || {
            got = completions.pop().unwrap();
            got.is_some()
        });
        Completion::from_entry(got.unwrap())
    }
}

/// A server, an engine that minds its own business, and the proof that it still can.
struct House {
    dir: tempfile::TempDir,
    _server: kvmp_server::Server,
    bystander: Engine,
}

impl House {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = server(name, dir.path(), 16 << 20, 2 << 20);
        let bystander = Engine::new(&server.endpoint(), &spec("m", &[4096]));
        assert_eq!(bystander.store(&chain(1, 10)), 10);
        Self { dir, _server: server, bystander }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("kvmp.sock")
    }

    fn unharmed(&self) {
        assert_eq!(self.bystander.hit(&chain(1, 10)), 10);
    }

    fn ends_one_session(&self, deed: impl FnOnce(&Raw)) {
        let before = self.bystander.stat("protocol_errors");
        let sessions = self.bystander.stat("sessions");
        let raw = Raw::attach(&self.socket(), Role::Scheduler);
        deed(&raw);
        raw.knock();
        let (message, _) = receive::<ServerMessage>(&raw.socket).unwrap();
        let told =
            matches!(&message, ServerMessage::Refused { refusal: Refusal::Protocol, message } if !message.is_empty());
        assert!(told, "{message:?}");
        assert!(matches!(receive::<ServerMessage>(&raw.socket), Err(SocketError::HangUp)));
        assert_eq!(self.bystander.stat("protocol_errors"), before + 1);
        assert_eq!(self.bystander.stat("sessions"), sessions);
        self.unharmed();
    }
}

#[test]
fn positions_that_lie_end_the_session() {
    let house = House::new("test-positions");
    for tail in [RING_ENTRIES + 1, u64::MAX, 1 << 40] {
        house.ends_one_session(|raw| raw.ring.queue(SUBMISSIONS).tail().store(tail, Ordering::Release));
    }
}

#[test]
fn completions_never_taken_end_the_session() {
    let house = House::new("test-overrun");
    house.ends_one_session(|raw| {
        let mut producer = Producer::new(raw.ring.queue(SUBMISSIONS));
        let ping = Submission { op: Op::Ping as u8, ..Submission::default() };
        for _ in 0..=RING_ENTRIES {
            until("room in the queue", || producer.push(&ping.to_entry()).unwrap().is_ok());
            raw.knock();
        }
    });
}

#[test]
fn ranges_and_lengths_that_lie_end_the_session() {
    let house = House::new("test-ranges");
    let lookup = Submission { op: Op::Lookup as u8, ..Submission::default() };
    for lie in [
        Submission { in_offset: u32::MAX, in_bytes: 32, count: 1, ..lookup },
        Submission { out_offset: 8 << 20, out_bytes: 1, ..lookup },
        Submission { out_offset: 4096, out_bytes: u32::MAX, ..lookup },
        Submission { count: u32::MAX, ..lookup },
        Submission { count: 2, in_bytes: 32, ..lookup },
        Submission { count: 0, in_bytes: 64, ..lookup },
    ] {
        house.ends_one_session(|raw| raw.submit(lie));
    }
}

#[test]
fn wrong_numbers_get_a_code_and_the_session_goes_on() {
    let house = House::new("test-codes");
    let expect = |role, submission: Submission, code: Code| {
        let raw = Raw::attach(&house.socket(), role);
        raw.submit(submission);
        assert_eq!(raw.answer().code, code as u16, "{submission:?}");
        house.unharmed();
    };
    let op = |op: u8| Submission { op, ..Submission::default() };
    expect(Role::Scheduler, op(99), Code::Unsupported);
    expect(Role::Scheduler, op(Op::Fetch as u8), Code::Unsupported);
    expect(Role::Scheduler, Submission { namespace: 4000, ..op(Op::Lookup as u8) }, Code::UnknownNamespace);
    expect(Role::Scheduler, Submission { namespace: 0, ..op(Op::Lookup as u8) }, Code::UnknownNamespace);
    expect(Role::Scheduler, Submission { lease: 77, ..op(Op::Release as u8) }, Code::UnknownLease);
    expect(Role::Scheduler, Submission { lease: 77, ..op(Op::Cancel as u8) }, Code::UnknownLease);
    expect(Role::Scheduler, op(Op::Commit as u8), Code::Forbidden);
    expect(Role::Tool, op(Op::Reserve as u8), Code::Forbidden);
    expect(Role::Tool, op(Op::Stats as u8), Code::OutTooSmall);
}

#[test]
fn rubbish_on_the_socket_ends_that_connection_with_a_reason() {
    let house = House::new("test-socket");
    let refusal = |bytes: &[u8]| {
        let socket = dial(&house.socket());
        rustix::net::send(&socket, bytes, SendFlags::NOSIGNAL).unwrap();
        let (message, _) = receive::<ServerMessage>(&socket).unwrap();
        assert!(matches!(receive::<ServerMessage>(&socket), Err(SocketError::HangUp)));
        house.unharmed();
        match message {
            ServerMessage::Refused { refusal, message } => (refusal, message),
            other => panic!("{other:?}"),
        }
    };
    let locate = Frame::encode(&ClientMessage::Locate).unwrap();
    let mut newer = locate.clone();
    newer[8..12].copy_from_slice(&[50, 0, 60, 0]);
    assert_eq!(refusal(&[7; 100]).0, Refusal::Protocol);
    assert_eq!(refusal(&locate[..70]).0, Refusal::Protocol);
    assert_eq!(refusal(&vec![0; 150_000]).0, Refusal::Protocol);
    assert_eq!(refusal(&locate).0, Refusal::Protocol);
    let (kind, message) = refusal(&newer);
    assert!(kind == Refusal::Version && message.contains("50 to 60"), "{message}");
    let stranger = Frame::encode(&hello(Role::Worker, Some(12345), Some(0))).unwrap();
    let (kind, message) = refusal(&stranger);
    assert!(kind == Refusal::Engine && message.contains("does not know it"), "{message}");
    assert_eq!(refusal(&Frame::encode(&hello(Role::Worker, None, None)).unwrap()).0, Refusal::Protocol);
}

#[test]
fn a_second_hello_ends_the_session() {
    let house = House::new("test-hello");
    let raw = Raw::attach(&house.socket(), Role::Scheduler);
    send(&raw.socket, &hello(Role::Scheduler, None, None), &[]).unwrap();
    assert!(matches!(receive::<ServerMessage>(&raw.socket).unwrap().0, ServerMessage::Refused { .. }));
    assert!(matches!(receive::<ServerMessage>(&raw.socket), Err(SocketError::HangUp)));
    until("it is gone", || house.bystander.stat("sessions") == 2);
}

#[test]
fn a_slot_larger_than_a_chunk_is_refused_with_both_sizes_and_the_mend() {
    let house = House::new("test-large");
    let large = spec("m", &[3 << 20]);
    let error = house.bystander.scheduler.open(&large, &support::patience()).unwrap_err().to_string();
    assert!(error.contains("3145728") && error.contains("2097152") && error.contains("--chunk"), "{error}");
    house.unharmed();
}

#[test]
fn a_worker_with_another_layout_is_refused() {
    let house = House::new("test-layout");
    let (worker, _) = &house.bystander.workers[0];
    let namespace = &house.bystander.namespace;
    let layout = serde_json::json!({ "bytes": 5 });
    let error = worker.join(namespace.id(), namespace.digest(), &layout, &support::patience()).unwrap_err().to_string();
    assert!(error.contains("layout"), "{error}");
    let error = worker.join(namespace.id(), &"0".repeat(64), &layout, &support::patience()).unwrap_err().to_string();
    assert!(error.contains("digest"), "{error}");
    house.unharmed();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever a session writes into its own ring, the server serves the others and stays.
    #[test]
    fn random_entries_harm_nobody(entries in prop::collection::vec(any::<[u64; 8]>(), 1..50), ops in prop::collection::vec(0u8..12, 50)) {
        let house = House::new("test-random");
        let raw = Raw::attach(&house.socket(), Role::Scheduler);
        let mut producer = Producer::new(raw.ring.queue(SUBMISSIONS));
        for (entry, op) in entries.iter().zip(ops) {
            let wild = Submission::from_entry(*entry);
            // Half of them with small numbers, so that they get past the first checks.
            let tame = Submission { op, count: wild.count % 8, in_offset: wild.in_offset % 4096, in_bytes: wild.count % 8 * 32,
                out_offset: wild.out_offset % 4096, out_bytes: 4096, namespace: wild.namespace % 2, flags: 0, ..wild };
            let mut entry = if wild.request.is_multiple_of(2) { wild } else { tame };
            // A clear is anybody's right, and would take the bystander's blocks.
            entry.op = if entry.op == Op::Clear as u8 { 0 } else { entry.op };
            let _ = producer.push(&entry.to_entry());
        }
        raw.knock();
        house.unharmed();
        drop(raw);
        until("it is gone", || house.bystander.stat("sessions") == 2);
        house.unharmed();
    }
}
