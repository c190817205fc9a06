//! A client that fills, re-flags, shrinks, locks or maps what it was given: nobody else waits, and nothing is left.

use std::os::fd::{AsFd, AsRawFd};

use kvmp_client::Bound;
use kvmp_core::ring::Ring;
use kvmp_core::segment::{Access, HOLDERS, LockKind, Mapping, holder_offset, try_lock};
use kvmp_core::wire::{ClientMessage, Op, Role, Submission, send};
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::footprint::Footprint;
use crate::raw::Raw;
use crate::support::{chain, spec, until};
use crate::theatre::{PARTS, Theatre};

/// Ten times an engine's bound: what takes longer waited for the client.
const WATCHDOG_MS: u64 = 1000;

fn control(fd: impl AsFd, command: i32, argument: i32) -> rustix::io::Result<()> {
    // SAFETY: these commands take an integer and touch no memory.
    match unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, argument) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
    }
}

/// A name and what is done.
type Deed = (&'static str, fn(&mut Raw));

fn waits_in_calls(fd: impl AsFd) {
    let flags = fcntl_getfl(&fd).unwrap();
    fcntl_setfl(&fd, flags - OFlags::NONBLOCK).unwrap();
}

fn fill_the_doorbell(raw: &mut Raw) {
    waits_in_calls(&raw.doorbell);
    rustix::io::write(&raw.doorbell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    // One more would wait for ever.
    fcntl_setfl(&raw.doorbell, fcntl_getfl(&raw.doorbell).unwrap() | OFlags::NONBLOCK).unwrap();
    assert_eq!(rustix::io::write(&raw.doorbell, &1u64.to_ne_bytes()), Err(Errno::AGAIN));
    waits_in_calls(&raw.doorbell);
    let ping = Submission { op: Op::Ping as u8, ..Submission::default() };
    raw.submissions.push(&ping.to_entry()).unwrap().unwrap();
}

fn reflag_everything(raw: &mut Raw) {
    for fd in [&raw.socket, &raw.segment, &raw.memory, &raw.doorbell, &raw.holder] {
        waits_in_calls(fd);
        control(fd, libc::F_SETOWN, std::process::id() as i32).unwrap();
        let flags = fcntl_getfl(fd).unwrap().bits() as i32;
        for more in [libc::O_APPEND, libc::O_NONBLOCK | libc::O_APPEND, libc::O_APPEND] {
            control(fd, libc::F_SETFL, flags | more).unwrap();
        }
    }
    // The signal for it would end this process, not the server.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    control(&raw.socket, libc::F_SETFL, libc::O_ASYNC).unwrap();
    raw.knock();
}

fn reshape_the_ring(raw: &mut Raw) {
    for bytes in [0, 4096, Ring::BYTES - 1, Ring::BYTES * 2] {
        assert_eq!(rustix::fs::ftruncate(&raw.memory, bytes), Err(Errno::PERM), "the ring is sealed");
    }
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&raw.memory, hole, 0, Ring::BYTES).unwrap();
    rustix::io::pwrite(&raw.memory, &[0xa5; 1 << 16], Ring::BYTES - (1 << 16)).unwrap();
    raw.knock();
}

fn map_and_hold_everything(raw: &mut Raw) {
    let table = holder_offset(HOLDERS);
    for (fd, bytes) in [(&raw.segment, table), (&raw.memory, Ring::BYTES), (&raw.holder, table)] {
        let file = std::fs::File::from(fd.try_clone().unwrap());
        let maps: Vec<Mapping> = (0..100).map(|_| Mapping::new(&file, 0, bytes, Access::Read).unwrap()).collect();
        // Mapped for the rest of this process's life.
        std::mem::forget(maps);
    }
}

fn lock_what_is_the_servers(raw: &mut Raw) {
    rustix::fs::flock(&raw.segment, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(!try_lock(&raw.segment, LockKind::Exclusive, 0, 1).unwrap(), "byte 0 is the server's");
    for lease in [libc::F_RDLCK, libc::F_WRLCK] {
        assert!(control(&raw.segment, libc::F_SETLEASE, lease).is_err());
    }
    assert!(rustix::fs::ftruncate(&raw.holder, 0).is_err(), "the holder entry's descriptor only reads");
}

/// The server must answer each, and nobody reads the answers.
fn never_read_the_socket(raw: &mut Raw) {
    let open = ClientMessage::Open { spec: spec("m", &PARTS) };
    let ended = (0..100_000).find(|_| send(&raw.socket, &open, &[]).is_err());
    assert!(ended.is_some(), "it was answered without end");
}

#[test]
fn what_a_client_does_to_its_descriptors_makes_nobody_else_wait() {
    let theatre = Theatre::open("descriptors");
    let deeds: [Deed; 6] = [
        ("fill", fill_the_doorbell),
        ("re-flag", reflag_everything),
        ("reshape", reshape_the_ring),
        ("map", map_and_hold_everything),
        ("lock", lock_what_is_the_servers),
        ("never read", never_read_the_socket),
    ];
    let before = Footprint::from_now(&theatre.server);
    let mut raws = Vec::new();
    for (seed, (name, deed)) in (10..).zip(deeds) {
        let mut raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
        deed(&mut raw);
        raws.push(raw);
        others_go_on(&theatre, name, seed);
    }
    until("the log says why one was let go", || theatre.server.logged("is ended: answering: no answer within") == 1);
    assert_eq!((theatre.stat("sessions"), theatre.stat("protocol_errors")), (6 + 5, 1));
    drop(raws);
    until("their sessions are gone", || theatre.stat("sessions") == 6);
    before.is_back(&theatre.server);
}

/// Calls of another client, each within its bound: counted by the server, which answered them.
fn others_go_on(theatre: &Theatre, deed: &str, seed: u8) {
    let lookups = theatre.stat("lookups");
    let engine = &theatre.bystanders[0];
    assert_eq!(engine.store(&chain(seed, 20)), 20, "{deed}");
    for _ in 0..100 {
        let hit = engine.scheduler.lookup(&engine.namespace, &chain(seed, 20), &Bound::ms(WATCHDOG_MS));
        assert_eq!(hit.unwrap_or_else(|error| panic!("{deed}: {error}")).tokens(), 320);
    }
    // The control thread too.
    engine.scheduler.open(&spec("m", &PARTS), &Bound::ms(WATCHDOG_MS)).unwrap_or_else(|e| panic!("{deed}: {e}"));
    assert_eq!(theatre.stat("lookups"), lookups + 100, "{deed}");
}
