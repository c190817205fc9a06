//! The real binary, killed with SIGKILL and started again: what was Ready is there, what was Writing comes back only when
//! its writer is gone.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(dead_code, reason = "each test binary uses its share of `support`")]

mod support;

use rustix::process::Signal;
use support::house::House;
use support::served::Served;
use support::{Engine, chain, spec, until};

fn warm(endpoint: &str, spec: &kvmp_core::namespace::NamespaceSpec) -> Engine {
    let engine = Engine::new(endpoint, spec);
    until("the arena is backed", || engine.stats()["warming"] == false);
    engine
}

#[test]
fn what_was_ready_is_hit_after_sigkill_with_the_old_bytes() {
    let house = House::new();
    let spec = spec("m", &[9000, 9000]);
    let mut first = house.start(&[]);
    let engine = warm(&house.endpoint(), &spec);
    let hashes = chain(1, 50);
    assert_eq!(engine.store(&hashes), 50);
    let segment = engine.scheduler.segment_id().to_owned();
    first.kill();
    until("the client sees the hang-up", || engine.scheduler.lost().is_some());
    let second = house.start(&[]);
    assert!(second.log().contains("50 blocks kept"), "{}", second.log());
    let again = Engine::new(&house.endpoint(), &spec);
    assert_eq!(again.scheduler.segment_id(), segment);
    assert_ne!(again.scheduler.server_epoch(), engine.scheduler.server_epoch());
    assert_eq!(again.hit(&hashes), 50);
}

#[test]
fn slots_of_a_writer_that_lives_are_not_given_away_by_the_next_server() {
    let house = House::new();
    let spec = spec("m", &[9000]);
    let mut first = house.start(&[]);
    let engine = warm(&house.endpoint(), &spec);
    let mut lease = engine.reserve(&chain(1, 20));
    lease.hand_over();
    let writing: Vec<u32> = Engine::granted(&lease).iter().map(|g| g.1).collect();
    assert_eq!(writing.len(), 20);
    first.kill();
    let second = house.start(&[]);
    assert!(second.log().contains("20 held back"), "{}", second.log());
    let other = warm(&house.endpoint(), &spec);
    for seed in 2..40 {
        let mut lease = other.reserve(&chain(seed, 30));
        let granted = Engine::granted(&lease);
        assert!(granted.iter().all(|g| !writing.contains(&g.1)), "a slot of a living writer was granted");
        lease.cancel();
    }
    assert_eq!((other.stat("blocks_quarantined"), other.hit(&chain(1, 20))), (20, 0));
    // The writer's process lets go of its holder entries: now they come back.
    drop(engine);
    until("the slots come back", || other.stat("blocks_quarantined") == 0);
}

#[test]
fn a_worker_that_dies_between_reserve_and_commit_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let server = support::server("test-dead-worker", dir.path(), 16 << 20, 2 << 20);
    let mut engine = Engine::new(&server.endpoint(), &spec("m", &[9000, 9000]));
    let hashes = chain(1, 10);
    let mut lease = engine.reserve(&hashes);
    lease.hand_over();
    engine.write_part(0, &lease, &hashes);
    let places = engine.workers[1].0.parts_at(&engine.workers[1].1, 0, &[Engine::granted(&lease)[0].1]).unwrap();
    drop(engine.workers.pop());
    // Its session is gone, but a copy of it may still run: the guard in `places` says so.
    until("the session is gone", || engine.stat("sessions") == 2);
    assert_eq!(engine.stat("blocks_writing"), 10);
    drop(places);
    until("its parts are closed", || engine.stat("blocks_writing") + engine.stat("blocks_quarantined") == 0);
    assert_eq!((engine.hit(&hashes), engine.stat("blocks_ready")), (0, 0));
}

#[test]
fn starts_that_fail_cost_the_old_cache_nothing() {
    let house = House::new();
    let spec = spec("m", &[9000]);
    let mut first = house.start(&[]);
    let engine = warm(&house.endpoint(), &spec);
    assert_eq!(engine.store(&chain(1, 50)), 50);
    drop(engine);
    first.kill();
    for size in ["16MiB", "16MiB", "16MiB", "32MiB"] {
        assert_eq!(house.fails(&["--socket", "/proc/nowhere/kvmp.sock", "--size", size]).0, 1);
    }
    let second = house.start(&[]);
    assert!(second.log().contains("50 blocks kept"), "{}", second.log());
}

#[test]
fn a_client_that_reconnects_does_not_hold_the_quarantine_up() {
    let house = House::new();
    let spec = spec("m", &[9000]);
    let mut first = house.start(&[]);
    let engine = warm(&house.endpoint(), &spec);
    let mut lease = engine.reserve(&chain(1, 20));
    lease.hand_over();
    first.kill();
    let _second = house.start(&[]);
    drop((lease, engine));
    let again = Engine::new(&house.endpoint(), &spec);
    assert_eq!(again.stat("blocks_quarantined"), 20);
    until("the slots come back", || again.stat("blocks_quarantined") == 0);
}

#[test]
fn a_server_whose_log_nobody_reads_serves_on() {
    let house = House::new();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut served = Served::unread(house.command(&["--ephemeral"]), full);
    until("it listens", || house.socket().exists());
    let engine = warm(&house.endpoint(), &spec("m", &[9000]));
    // Both of these are logged.
    let other = Engine::new(&house.endpoint(), &spec("m", &[8000]));
    assert_eq!((engine.store(&chain(1, 5)), other.store(&chain(1, 5))), (5, 5));
    served.signal(Signal::TERM);
    assert_eq!(served.wait().code(), Some(0));
}
