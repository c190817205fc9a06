//! Ten thousand of what is harmless once: connects and disconnects, lookups given up on.

use std::sync::atomic::{AtomicUsize, Ordering};

use kvmp_client::{ClientError, ConnectOptions};
use kvmp_core::ids::BlockKey;
use kvmp_core::ring::{COMPLETIONS, Consumer};
use kvmp_core::wire::{Completion, Op, Role, Submission, send};

use crate::footprint::Footprint;
use crate::raw::{Raw, dial, hello};
use crate::support::{chain, connect, patience, spec, until};
use crate::theatre::{PARTS, SLOTS, Theatre};

const TIMES: usize = 10_000;

/// A theatre that has had every kind of visitor once, so that what is made once is made.
fn lived_in(name: &str) -> Theatre {
    let theatre = Theatre::open(name);
    assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
    assert_eq!(theatre.hit(1, 20), 20);
    VISITS.iter().for_each(|visit| visit(&theatre));
    forgotten(&theatre);
    theatre
}

fn forgotten(theatre: &Theatre) {
    until("all are forgotten", || theatre.stat("sessions") == 6 && theatre.stat("engines") == 2);
    until("nothing is held", || theatre.unsettled() + theatre.stat("pins") == 0);
    assert_eq!((theatre.stat("read_leases"), theatre.stat("write_leases")), (0, 0));
}

fn polite(theatre: &Theatre) {
    drop(connect(&theatre.server.endpoint(), &ConnectOptions::new(Role::Scheduler)));
}

fn gone_before_the_hello(theatre: &Theatre) {
    drop(dial(&theatre.server.socket()));
}

fn gone_before_the_welcome(theatre: &Theatre) {
    let socket = dial(&theatre.server.socket());
    send(&socket, &hello(Role::Scheduler), &[]).unwrap();
}

/// Opens the namespace, and lays the stored chain's keys into the scratch area.
fn lookup_of_the_chain(raw: &Raw) -> Submission {
    let namespace = raw.open(&spec("m", &PARTS));
    raw.ring.write_scratch(0, chain(1, 20).as_flattened());
    let (count, in_bytes, out_offset) = (20, 20 * BlockKey::BYTES as u32, 4096);
    Submission {
        op: Op::Lookup as u8,
        namespace,
        count,
        in_bytes,
        out_offset,
        out_bytes: 4096,
        ..Submission::default()
    }
}

fn gone_with_requests_open(theatre: &Theatre) {
    let mut raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
    let lookup = lookup_of_the_chain(&raw);
    raw.submit(lookup);
    raw.submit(Submission { op: Op::Reserve as u8, out_offset: 8192, ..lookup });
}

const VISITS: [fn(&Theatre); 4] = [polite, gone_before_the_hello, gone_before_the_welcome, gone_with_requests_open];

/// Thousands of rounds, and as many again: the second leave nothing at all behind in these processes.
fn twice(pids: &[u32], rounds: impl Fn()) {
    rounds();
    let half: Vec<Footprint> = pids.iter().map(|pid| Footprint::of_pid(*pid)).collect();
    rounds();
    half.iter().zip(pids).for_each(|(half, pid)| half.did_not_grow(*pid));
}

#[test]
fn ten_thousand_connects_leave_nothing() {
    let theatre = lived_in("connects");
    let (server, own) = (Footprint::from_now(&theatre.server), Footprint::of_pid(std::process::id()));
    // This process keeps the server's log, which has lines of them.
    twice(&[theatre.server.pid()], || {
        (0..TIMES / 2).for_each(|round| VISITS[round % VISITS.len()](&theatre));
        forgotten(&theatre);
        assert_eq!(theatre.hit(1, 20), 20);
        server.is_back(&theatre.server);
    });
    let now = Footprint::of_pid(std::process::id());
    assert_eq!((now.fds, now.maps), (own.fds, own.maps), "of the client");
}

#[test]
fn ten_thousand_lookups_given_up_on_leave_nothing() {
    let theatre = lived_in("lookups");
    let engine = &theatre.bystanders[0];
    let hashes = chain(1, 20);
    let (server, own) = (Footprint::from_now(&theatre.server), Footprint::of_pid(std::process::id()));
    twice(&[theatre.server.pid(), std::process::id()], || {
        let (lookups, hits) = (theatre.stat("lookups"), theatre.stat("lookup_hit_blocks"));
        for _ in 0..TIMES {
            // Sent, and let go before anybody looks for the answer.
            while let Err(error) = engine.scheduler.submit_lookup(&engine.namespace, &hashes) {
                assert!(matches!(error, ClientError::Busy { .. }), "{error}");
                engine.scheduler.ping(&patience()).unwrap();
            }
        }
        until("all are answered", || theatre.stat("lookups") == lookups + TIMES as u64);
        assert_eq!(theatre.stat("lookup_hit_blocks"), hits + 20 * TIMES as u64, "each of them was given a lease");
        until("every lease is given back", || theatre.stat("pins") + theatre.stat("read_leases") == 0);
        engine.scheduler.ping(&patience()).unwrap();
        assert_eq!((engine.scheduler.open_requests().unwrap(), theatre.stat("refused_releases")), (0, 0));
    });
    // All of the scratch area is free again: as many questions fit as at first.
    assert_eq!(open_until_busy(&theatre), 952);
    assert_eq!(theatre.hit(1, 20), 20);
    server.is_back(&theatre.server);
    let now = Footprint::of_pid(std::process::id());
    assert_eq!((now.fds, now.maps), (own.fds, own.maps), "of the client");
}

#[test]
fn leases_that_are_never_given_back_are_few_and_end_with_the_session() {
    let theatre = lived_in("leases");
    let mut raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
    let lookup = lookup_of_the_chain(&raw);
    let mut completions = Consumer::new(raw.ring.queue(COMPLETIONS));
    let (mut pinned, mut tokens) = (0, 0);
    for _ in 0..TIMES {
        raw.submit(lookup);
        until("an answer", || {
            let answer = completions.pop().unwrap().map(Completion::from_entry);
            pinned += u64::from(answer.is_some_and(|answer| answer.lease != 0));
            tokens += answer.map_or(0, |answer| u64::from(answer.tokens));
            answer.is_some()
        });
    }
    // Half the arena's pages, and 20 blocks of two pages in each lease.
    assert_eq!((pinned, tokens), (SLOTS as u64 / 40, 320 * TIMES as u64), "hits go on without pins");
    assert_eq!((theatre.stat("read_leases"), theatre.stat("pins")), (pinned, pinned));
    drop(raw);
    forgotten(&theatre);
}

/// While the server is stopped: how many questions find room.
fn open_until_busy(theatre: &Theatre) -> usize {
    let engine = &theatre.bystanders[0];
    theatre.server.freeze();
    let ask = || engine.scheduler.submit_lookup(&engine.namespace, &chain(1, 20));
    let open: Vec<_> = std::iter::from_fn(|| ask().ok()).collect();
    theatre.server.signal(rustix::process::Signal::CONT);
    // Answered after all of them.
    engine.scheduler.ping(&patience()).unwrap();
    open.len()
}

/// Between two answers of the control thread to one client, others may have connected so often.
const CONNECTS_AN_ANSWER: usize = 1000;

#[test]
fn clients_that_connect_without_end_do_not_keep_others_from_being_heard() {
    let theatre = lived_in("flood");
    let (connects, answers) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while answers.load(Ordering::Relaxed) < 100 {
                    gone_before_the_hello(&theatre);
                    connects.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        until("they have begun", || connects.load(Ordering::Relaxed) > 100);
        let engine = &theatre.bystanders[0];
        while answers.load(Ordering::Relaxed) < 100 {
            engine.scheduler.open(&spec("m", &PARTS), &patience()).unwrap();
            answers.fetch_add(1, Ordering::Relaxed);
        }
    });
    let connects = connects.into_inner();
    assert!(connects < 100 * CONNECTS_AN_ANSWER, "{connects} connects while 100 questions were answered");
    forgotten(&theatre);
}
