//! Clients that lie on ring and socket: the session ends with a reason in the log, counted; others notice nothing, and
//! nothing is left of it. (`bad_clients.rs` shows lie by lie what the client is told.)

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvmp_core::ids::BlockKey;
use kvmp_core::ring::{COMPLETIONS, QueueCells, RING_ENTRIES, SUBMISSIONS};
use kvmp_core::sync::Ordering;
use kvmp_core::wire::{ClientMessage, Frame, Op, Role, ServerMessage, SocketError, Submission, receive};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown};

use crate::footprint::Footprint;
use crate::raw::{Raw, dial, hello};
use crate::serve::Serve;
use crate::support::{chain, spec, until};
use crate::theatre::{PARTS, Theatre};

/// More than any buffer of the server's would hold if it kept something of each.
const ROUNDS: u64 = 100;

/// The reason that the server gives, and the lie.
type Lie = (&'static str, fn(&mut Raw));

fn unharmed(theatre: &Theatre) {
    assert_eq!(theatre.hit(1, 20), 20);
}

fn house(name: &str) -> Theatre {
    let theatre = Theatre::open(name);
    assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
    theatre
}

fn lookup(count: u32) -> Submission {
    let bytes = count * BlockKey::BYTES as u32;
    Submission {
        op: Op::Lookup as u8,
        count,
        in_bytes: bytes,
        out_offset: 4 << 20,
        out_bytes: 4 << 20,
        ..Submission::default()
    }
}

fn jump_the_tail(raw: &mut Raw) {
    raw.ring.queue(SUBMISSIONS).tail().store(u64::MAX / 2, Ordering::Release);
    raw.knock();
}

fn jump_the_head(raw: &mut Raw) {
    raw.ring.queue(COMPLETIONS).head().store(1 << 40, Ordering::Release);
    let ping = Submission { op: Op::Ping as u8, ..Submission::default() };
    // It is looked at when the queue seems full.
    for round in 0..=RING_ENTRIES {
        until("room", || raw.ring.queue(SUBMISSIONS).head().load(Ordering::Acquire) + RING_ENTRIES > round);
        raw.submit(ping);
    }
}

fn fill_the_ring_with_rubbish(raw: &mut Raw) {
    for entry in 0..RING_ENTRIES {
        raw.submissions.push(&[entry.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 0xff00; 8]).unwrap().unwrap();
    }
    raw.knock();
}

fn lie_about_a_length(raw: &mut Raw) {
    raw.submit(Submission { in_bytes: u32::MAX, ..lookup(1) });
}

fn send_rubbish(raw: &mut Raw) {
    rustix::net::send(&raw.socket, &[7; 100], SendFlags::NOSIGNAL).unwrap();
}

fn send_half_a_message(raw: &mut Raw) {
    let open = Frame::encode(&ClientMessage::Open { spec: spec("m", &PARTS) }).unwrap();
    rustix::net::send(&raw.socket, &open[..open.len() / 2], SendFlags::NOSIGNAL).unwrap();
}

fn send_too_much(raw: &mut Raw) {
    rustix::net::send(&raw.socket, &vec![0; 150_000], SendFlags::NOSIGNAL).unwrap();
}

fn say_hello_again(raw: &mut Raw) {
    kvmp_core::wire::send(&raw.socket, &hello(Role::Scheduler), &[]).unwrap();
}

#[test]
fn a_lie_ends_its_session_with_a_reason_in_the_log() {
    let theatre = house("lies");
    let lies: [Lie; 8] = [
        ("its ring makes no sense: queue position", jump_the_tail),
        ("its ring makes no sense: queue position", jump_the_head),
        ("it names more items than one request may", fill_the_ring_with_rubbish),
        ("a range lies outside the scratch area", lie_about_a_length),
        ("not a kvmp message (100 bytes)", send_rubbish),
        ("message front says", send_half_a_message),
        ("message front says", send_too_much),
        ("a second hello on one connection", say_hello_again),
    ];
    let before = Footprint::from_now(&theatre.server);
    for round in 0..ROUNDS {
        for (reason, lie) in lies {
            let mut raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
            raw.open(&spec("m", &PARTS));
            lie(&mut raw);
            let told = raw.refusal();
            assert!(told.contains(reason), "{told}");
        }
        if round % 16 == 0 {
            unharmed(&theatre);
        }
    }
    until("they are counted", || theatre.stat("protocol_errors") == 8 * ROUNDS);
    for (reason, _) in lies {
        let times = ROUNDS as usize * lies.iter().filter(|lie| lie.0 == reason).count();
        let said = || theatre.server.logged(reason);
        until("they are in the log", || said() == times);
    }
    unharmed(&theatre);
    before.is_back(&theatre.server);
}

/// More lines than the pipe and the queue before it hold.
#[test]
fn a_log_that_nobody_reads_makes_nobody_wait_for_it() {
    let (server, mut unread) = Serve::mute("mute");
    let theatre = Theatre::with(server);
    assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
    for lie in [lie_about_a_length, send_rubbish].iter().cycle().take(3000) {
        let mut raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
        lie(&mut raw);
        raw.refusal();
    }
    unharmed(&theatre);
    let mut log = Vec::new();
    until("the log says that lines were dropped", || {
        let mut piece = [0; 1 << 16];
        let bytes = unread.read(&mut piece).unwrap();
        log.extend_from_slice(&piece[..bytes]);
        String::from_utf8_lossy(&log).contains("lines of this log were dropped: nobody read it")
    });
}

#[test]
fn a_client_that_closes_half_way_leaves_nothing() {
    let theatre = house("half-way");
    let begun = theatre.stat("reserves");
    let before = Footprint::from_now(&theatre.server);
    for round in 0..ROUNDS {
        let mut raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
        let namespace = raw.open(&spec("m", &PARTS));
        raw.ring.write_scratch(0, chain(1, 16_384).as_flattened());
        // A lookup and a reserve of many slices each, under way when the end comes.
        raw.submit(Submission { namespace, ..lookup(16_384) });
        raw.submit(Submission { namespace, op: Op::Reserve as u8, ..lookup(16_384) });
        match round % 3 {
            0 => rustix::net::shutdown(&raw.socket, Shutdown::Write).unwrap(),
            1 => rustix::net::shutdown(&raw.socket, Shutdown::Both).unwrap(),
            _ => {}
        }
        if round % 3 == 0 {
            assert!(matches!(receive::<ServerMessage>(&raw.socket), Err(SocketError::HangUp)));
        }
    }
    assert!(theatre.stat("reserves") > begun, "no request was under way");
    until("nothing is pinned or being written", || theatre.unsettled() + theatre.stat("pins") == 0);
    until("it is forgotten", || theatre.stat("engines") == 2);
    assert_eq!((theatre.stat("read_leases"), theatre.stat("write_leases")), (0, 0));
    unharmed(&theatre);
    before.is_back(&theatre.server);
}

/// Sends bytes with copies of a descriptor beside them.
fn send_with(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

#[test]
fn descriptors_sent_to_the_server_are_closed() {
    let theatre = house("rights");
    let before = Footprint::from_now(&theatre.server);
    let plain = Raw::attach(&theatre.server.socket(), Role::Scheduler);
    // An answer later, what it takes to welcome it is gone.
    plain.open(&spec("m", &PARTS));
    let session = Footprint::of(&theatre.server).fds - before.fds;
    drop(plain);
    before.is_back(&theatre.server);
    let (mine, other_end) = std::io::pipe().unwrap();
    let greeting = Frame::encode(&hello(Role::Scheduler)).unwrap();
    let mut raws = Vec::new();
    for count in [1, 8, 9, 100, 253] {
        let socket = dial(&theatre.server.socket());
        send_with(&socket, &greeting, &vec![other_end.as_fd(); count]);
        let raw = Raw::welcomed(socket);
        let open = Frame::encode(&ClientMessage::Open { spec: spec("m", &PARTS) }).unwrap();
        send_with(&raw.socket, &open, &vec![raw.segment.as_fd(); count]);
        assert!(matches!(receive::<ServerMessage>(&raw.socket).unwrap().0, ServerMessage::Opened(_)));
        raws.push(raw);
        assert_eq!(Footprint::of(&theatre.server).fds, before.fds + raws.len() * session);
        // Rubbish with descriptors.
        let stranger = dial(&theatre.server.socket());
        send_with(&stranger, &[7; 80], &vec![other_end.as_fd(); count]);
        assert!(matches!(receive::<ServerMessage>(&stranger).unwrap().0, ServerMessage::Refused { .. }));
    }
    // No copy of the writing end is left anywhere: the reading end sees that.
    drop(other_end);
    until("the last copy is closed", || rustix::io::read(&mine, &mut [0u8; 1]) == Ok(0));
    drop(raws);
    unharmed(&theatre);
    before.is_back(&theatre.server);
}

#[test]
fn who_says_no_hello_is_let_go() {
    let theatre = house("silent");
    let before = Footprint::from_now(&theatre.server);
    let silent: Vec<OwnedFd> = (0..200).map(|_| dial(&theatre.server.socket())).collect();
    until("they are accepted", || Footprint::of(&theatre.server).fds == before.fds + silent.len());
    unharmed(&theatre);
    until("they are let go", || theatre.server.logged("it said no hello") == silent.len());
    before.is_back(&theatre.server);
    assert!(silent.iter().all(|socket| matches!(receive::<ServerMessage>(socket), Err(SocketError::HangUp))));
}
