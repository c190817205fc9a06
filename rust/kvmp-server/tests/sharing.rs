//! Engines that share one server: hits across engines, parts, slot sizes that compete for chunks.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(dead_code, reason = "each test binary uses its share of `support`")]

mod support;

use support::{Engine, chain, server, spec, until};

const MIB: u64 = 1 << 20;

#[test]
fn what_one_engine_stored_another_hits() {
    let dir = tempfile::tempdir().unwrap();
    let server = server("test-sharing", dir.path(), 16 * MIB, 2 * MIB);
    let spec = spec("m", &[10_000]);
    let (one, two) = (Engine::new(&server.endpoint(), &spec), Engine::new(&server.endpoint(), &spec));
    let hashes = chain(1, 100);
    assert_eq!(two.hit(&hashes), 0);
    assert_eq!(one.store(&hashes), 100);
    assert_eq!(two.hit(&hashes), 100);
    assert_eq!(two.store(&hashes), 0, "what is there is not stored again");
    assert_eq!(two.hit(&chain(2, 100)), 0);
    let mut forked = hashes[..50].to_vec();
    forked.extend(&chain(3, 10));
    assert_eq!(two.hit(&forked), 50);
}

#[test]
fn a_block_is_visible_when_every_part_is_committed_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let server = server("test-parts", dir.path(), 16 * MIB, 2 * MIB);
    let engine = Engine::new(&server.endpoint(), &spec("m", &[5000, 7000]));
    let hashes = chain(1, 8);
    let mut lease = engine.reserve(&hashes);
    lease.hand_over();
    engine.write_part(1, &lease, &hashes);
    assert_eq!(engine.hit(&hashes), 0);
    engine.write_part(0, &lease, &hashes);
    assert_eq!(engine.hit(&hashes), 8);
}

#[test]
fn engines_whose_specs_differ_share_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = server("test-differ", dir.path(), 16 * MIB, 2 * MIB);
    let ours = spec("m", &[4096]);
    let mut theirs = ours.clone();
    theirs.facts.insert("dtype".into(), serde_json::json!("bfloat16"));
    let (one, two) = (Engine::new(&server.endpoint(), &ours), Engine::new(&server.endpoint(), &theirs));
    let hashes = chain(1, 4);
    assert_eq!(one.store(&hashes), 4);
    assert_eq!(two.hit(&hashes), 0);
    assert_eq!(two.store(&hashes), 4);
}

#[test]
fn the_later_of_two_block_sizes_gets_room_in_a_full_arena() {
    let dir = tempfile::tempdir().unwrap();
    let server = server("test-sizes", dir.path(), 16 * MIB, 2 * MIB);
    let small = Engine::new(&server.endpoint(), &spec("small", &[4096]));
    for seed in 0..20 {
        small.store(&chain(seed, 256));
    }
    assert!(small.stat("evictions") > 0, "the arena was never full");
    let large = Engine::new(&server.endpoint(), &spec("large", &[300_000]));
    let hashes = chain(50, 4);
    until("the later size gets its slots", || {
        large.store(&hashes);
        large.hit(&hashes) == 4
    });
    assert!(large.stat("chunk_moves") > 0);
    assert!(small.hit(&chain(19, 256)) > 0, "the other size keeps the rest");
}

#[test]
fn an_arena_that_evicts_all_the_time_never_gives_another_blocks_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let server = server("test-evict", dir.path(), 4 * MIB, 2 * MIB);
    let (one, two) = (
        Engine::new(&server.endpoint(), &spec("m", &[30_000])),
        Engine::new(&server.endpoint(), &spec("m", &[30_000])),
    );
    let mut hits = 0;
    for round in 0..60u8 {
        let engine = if round % 2 == 0 { &one } else { &two };
        engine.store(&chain(round, 40));
        hits += one.hit(&chain(round, 40)) + two.hit(&chain(round.saturating_sub(1), 40));
    }
    assert!(hits > 0 && one.stat("evictions") > 1000, "hits {hits}, evictions {}", one.stat("evictions"));
}
