//! A session against a server that answers late, wrongly or never.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod fake;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use fake::{Fake, GENEROUS, Listener};
use kvmp_client::{Bound, Client, ClientError, ConnectOptions, LostWhy, Namespace, PendingLookup, ReserveList};
use kvmp_core::ids::ChunkId;
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::ring::{COMPLETIONS, QueueCells};
use kvmp_core::segment::ChunkWord;
use kvmp_core::wire::{Completion, GroupOut, LookupOut, Op, Role, Submission};
use zerocopy::IntoBytes;

fn spec() -> NamespaceSpec {
    NamespaceSpec {
        model: "m".into(),
        facts: BTreeMap::new(),
        groups: vec![GroupSpec { rule: GroupRule::Prefix, block_tokens: 16, window_tokens: 0, hash_stride: 1 }],
        parts: vec![PartSpec { bytes: vec![4096], layout: serde_json::Value::Null }],
        salt: String::new(),
    }
}

fn opened() -> (Client, Fake, Namespace) {
    let (client, server) = Fake::connected();
    let namespace = std::thread::scope(|scope| {
        scope.spawn(|| server.answer_open());
        client.open(&spec(), &Bound::ms(GENEROUS)).unwrap()
    });
    (client, server, namespace)
}

fn hashes(count: usize) -> Vec<[u8; 32]> {
    (0..count).map(|i| [i as u8; 32]).collect()
}

fn ok(submission: &Submission) -> Completion {
    Completion { request: submission.request, ..Completion::default() }
}

/// Answers a lookup with a hit of `count` blocks under `lease`.
fn hit(server: &mut Fake, asked: &Submission, count: u32, lease: u64) {
    let mut out = GroupOut { first_block: 0, count }.as_bytes().to_vec();
    for slot in 0..count {
        out.extend_from_slice(LookupOut { slot, reserved: 0, word: 9 }.as_bytes());
    }
    server.ring.write_scratch(asked.out_offset, &out);
    let done = Completion { lease, tokens: count * 16, count, out_bytes: out.len() as u32, ..ok(asked) };
    server.complete(done);
}

#[test]
fn a_reply_wakes_a_client_that_sleeps() {
    let (client, mut server) = Fake::connected();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let ping = server.take();
            // Only once the client sleeps (or is about to): the doorbell must not be missed.
            while server.ring.client_parked().load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            server.complete(ok(&ping));
        });
        client.ping(&Bound::ms(GENEROUS)).unwrap();
    });
    assert_eq!(client.open_requests().unwrap(), 0);
}

#[test]
fn replies_come_in_any_order() {
    let (client, mut server, namespace) = opened();
    let mut first = client.submit_lookup(&namespace, &hashes(2)).unwrap();
    let mut second = client.submit_lookup(&namespace, &hashes(1)).unwrap();
    let (a, b) = (server.take(), server.take());
    hit(&mut server, &b, 1, 11);
    assert!(first.poll().unwrap().is_none());
    assert_eq!(second.poll().unwrap().unwrap().tokens(), 16);
    hit(&mut server, &a, 2, 12);
    let lease = first.poll().unwrap().unwrap();
    assert_eq!((lease.tokens(), lease.pinned(), lease.group(0).unwrap().slots.clone()), (32, true, vec![0, 1]));
}

#[test]
fn a_late_hit_is_released_and_keeps_its_range_until_then() {
    let (client, mut server, namespace) = opened();
    let missed = client.lookup(&namespace, &hashes(4), &Bound::ms(5));
    assert!(matches!(missed, Err(ClientError::BoundExceeded { op: "lookup", limit_ms: 5 })));
    let late = server.take();
    assert_eq!(client.open_requests().unwrap(), 1, "the request is kept");

    // Lost: nothing waits, nothing is submitted.
    let waited = client.waited_us();
    let refused = client.lookup(&namespace, &hashes(4), &Bound::ms(GENEROUS));
    assert!(matches!(refused, Err(ClientError::Lost(LostWhy::MissedBound { op: "lookup", .. }))));
    assert!(matches!(client.stats(&Bound::ms(GENEROUS)), Err(ClientError::Lost(_))));
    assert_eq!(client.waited_us(), waited);
    assert!(server.take_now().is_none());

    // The late hit comes, and a ping is answered.
    hit(&mut server, &late, 4, 77);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2 {
                let asked = server.take();
                if asked.op == Op::Release as u8 {
                    assert_eq!(asked.lease, 77);
                }
                server.complete(ok(&asked));
            }
        });
        client.ping(&Bound::ms(GENEROUS)).unwrap();
    });
    assert!(client.lost().is_none());

    // The range is free again, and so the next lookup gets the same one.
    let _next = client.submit_lookup(&namespace, &hashes(4)).unwrap();
    assert_eq!(server.take().out_offset, late.out_offset);
}

#[test]
fn a_range_is_not_given_out_again_before_its_late_reply() {
    let (client, mut server, namespace) = opened();
    drop(client.submit_lookup(&namespace, &hashes(4)).unwrap());
    let late = server.take();
    let _next = client.submit_lookup(&namespace, &hashes(4)).unwrap();
    let next = server.take();
    assert!(next.out_offset >= late.out_offset + late.out_bytes || next.out_offset + next.out_bytes <= late.out_offset);
    assert!(next.in_offset != late.in_offset);
}

#[test]
fn a_late_grant_is_cancelled() {
    let (client, mut server, namespace) = opened();
    let list = ReserveList { hashes: &hashes(1), first_block: 0, parent: None, group: 0 };
    drop(client.submit_reserve(&namespace, &list).unwrap());
    let late = server.take();
    server.complete(Completion { lease: 5, count: 1, ..ok(&late) });
    let _harvests = client.submit_lookup(&namespace, &hashes(1)).unwrap();
    let cancel = server.take();
    assert_eq!((cancel.op, cancel.lease), (Op::Cancel as u8, 5));
}

#[test]
fn a_dropped_lease_is_ended_and_a_handed_over_one_is_not() {
    let (client, mut server, namespace) = opened();
    let list = ReserveList { hashes: &hashes(1), first_block: 0, parent: None, group: 0 };
    for handed_over in [true, false] {
        let mut pending = client.submit_reserve(&namespace, &list).unwrap();
        let asked = server.take();
        server.ring.write_scratch(asked.out_offset, &[0; 16]);
        server.complete(Completion { lease: 6, count: 1, out_bytes: 16, ..ok(&asked) });
        let mut lease = pending.poll().unwrap().unwrap();
        if handed_over {
            lease.hand_over();
        }
        drop(lease);
        assert_eq!(server.take_now().map(|asked| asked.op), (!handed_over).then_some(Op::Cancel as u8));
    }
}

#[test]
fn pings_of_a_frozen_server_do_not_pile_up() {
    let (client, mut server) = Fake::connected();
    for _ in 0..5 {
        assert!(matches!(client.ping(&Bound::ms(1)), Err(ClientError::BoundExceeded { op: "ping", .. })));
    }
    assert_eq!(client.open_requests().unwrap(), 1);
    let ping = server.take();
    assert!(server.take_now().is_none());
    server.complete(ok(&ping));
    assert!(client.lost().is_some(), "not yet harvested");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let again = server.take();
            server.complete(ok(&again));
        });
        client.ping(&Bound::ms(GENEROUS)).unwrap();
    });
    assert!(client.lost().is_none());
}

#[test]
fn a_hang_up_ends_a_wait_and_all_calls_after_it() {
    let (client, mut server, namespace) = opened();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            server.take();
            server.socket.take();
        });
        let ended = client.lookup(&namespace, &hashes(1), &Bound::ms(60_000));
        assert!(matches!(ended, Err(ClientError::Lost(LostWhy::HungUp(_)))));
    });
    assert!(matches!(client.ping(&Bound::ms(60_000)), Err(ClientError::Lost(LostWhy::HungUp(_)))));
    assert!(matches!(client.submit_lookup(&namespace, &hashes(1)), Err(ClientError::Lost(LostWhy::HungUp(_)))));
}

#[test]
fn what_the_server_said_last_is_passed_on() {
    let (client, mut server) = Fake::connected();
    let last = kvmp_core::wire::ServerMessage::Refused {
        refusal: kvmp_core::wire::Refusal::Protocol,
        message: "entry 7 makes no sense".into(),
    };
    kvmp_core::wire::send(server.socket.as_ref().unwrap(), &last, &[]).unwrap();
    server.socket.take();
    assert_eq!(client.lost(), Some(LostWhy::HungUp(Some("entry 7 makes no sense".into()))));
}

#[test]
fn a_server_that_lies_ends_the_session() {
    let lies: [fn(&mut Fake, &Submission); 4] = [
        |server, asked| server.complete(Completion { request: asked.request + 100, ..Completion::default() }),
        |server, asked| server.complete(Completion { out_bytes: asked.out_bytes + 1, ..ok(asked) }),
        |server, asked| (0..2).for_each(|_| server.complete(ok(asked))),
        |server, _| server.ring.queue(COMPLETIONS).tail().store(5000, Ordering::Release),
    ];
    for (i, lie) in lies.into_iter().enumerate() {
        let (client, mut server, namespace) = opened();
        let mut pending = client.submit_lookup(&namespace, &hashes(1)).unwrap();
        let asked = server.take();
        lie(&mut server, &asked);
        assert!(matches!(pending.poll(), Err(ClientError::Protocol(_))), "lie {i}");
        assert!(matches!(client.lost(), Some(LostWhy::Protocol(_))), "lie {i}");
    }
}

#[test]
fn an_answer_that_does_not_add_up_is_refused() {
    let (client, mut server, namespace) = opened();
    let mut pending = client.submit_lookup(&namespace, &hashes(2)).unwrap();
    let asked = server.take();
    server.ring.write_scratch(asked.out_offset, GroupOut { first_block: 0, count: 3 }.as_bytes());
    server.complete(Completion { out_bytes: 8, tokens: 48, ..ok(&asked) });
    assert!(matches!(pending.poll(), Err(ClientError::Protocol(_))));
}

#[test]
fn a_long_list_goes_on_after_a_full_hit_only() {
    let (client, mut server, namespace) = opened();
    let mut pending = client.submit_lookup(&namespace, &hashes(40)).unwrap();
    for (first_block, count, lease) in [(0, 16, 21), (16, 16, 22), (32, 3, 23)] {
        assert!(pending.poll().unwrap().is_none());
        let asked = server.take();
        assert_eq!((asked.first_block, asked.count), (first_block, if first_block == 32 { 8 } else { 16 }));
        hit(&mut server, &asked, count, lease);
    }
    let mut lease = pending.poll().unwrap().unwrap();
    assert_eq!((lease.tokens(), lease.group(0).unwrap().slots.len()), (35 * 16, 35));
    lease.release();
    lease.release();
    let released: Vec<u64> = std::iter::from_fn(|| server.take_now()).map(|asked| asked.lease).collect();
    assert_eq!(released, [21, 22, 23]);

    let mut pending = client.submit_lookup(&namespace, &hashes(40)).unwrap();
    let asked = server.take();
    hit(&mut server, &asked, 15, 24);
    assert_eq!(pending.poll().unwrap().unwrap().tokens(), 15 * 16);
}

/// Asks until there is no room for one more question.
fn fill(client: &Client, namespace: &Namespace) -> (Vec<PendingLookup>, ClientError) {
    let mut open = Vec::new();
    loop {
        match client.submit_lookup(namespace, &hashes(1)) {
            Ok(pending) => open.push(pending),
            Err(error) => return (open, error),
        }
    }
}

#[test]
fn a_full_table_is_said_and_never_waited_for() {
    let (client, _server, namespace) = opened();
    let (open, full) = fill(&client, &namespace);
    assert!(matches!(full, ClientError::Busy { op: "lookup", open: 952, .. }), "{full}");
    assert_eq!(open.len(), 952);
    assert!(client.lost().is_none());
}

#[test]
fn an_answer_that_nobody_has_taken_keeps_no_room() {
    let (client, mut server, namespace) = opened();
    let mut places = std::collections::BTreeSet::new();
    let mut pending = Vec::new();
    for lease in 1..=2000 {
        pending.push(client.submit_lookup(&namespace, &hashes(1)).unwrap());
        let asked = server.take();
        places.insert(asked.out_offset);
        hit(&mut server, &asked, 1, lease);
    }
    assert!(places.len() <= 2, "the scratch ranges are free as soon as the replies are harvested: {places:?}");
    for (lease, pending) in (1..).zip(&mut pending) {
        let mut hit = pending.poll().unwrap().unwrap();
        assert_eq!(hit.group(0).unwrap().words, [9], "reply {lease} is its own");
        hit.release();
        let released = server.take();
        assert_eq!(released.lease, lease);
        server.complete(ok(&released));
    }
}

#[test]
fn lease_ends_and_pings_find_room_beside_all_questions() {
    let (client, mut server, namespace) = opened();
    let mut pending = client.submit_lookup(&namespace, &hashes(1)).unwrap();
    let asked = server.take();
    hit(&mut server, &asked, 1, 31);
    let lease = pending.poll().unwrap().unwrap();
    let (open, _) = fill(&client, &namespace);
    drop(lease);
    for _ in &open {
        assert_eq!(server.take().op, Op::Lookup as u8);
    }
    let released = server.take_now().unwrap();
    assert_eq!((released.op, released.lease), (Op::Release as u8, 31));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let ping = server.take();
            assert_eq!(ping.op, Op::Ping as u8);
            server.complete(ok(&ping));
        });
        client.ping(&Bound::ms(GENEROUS)).unwrap();
    });
}

#[test]
fn threads_share_a_client() {
    let (client, mut server) = Fake::connected();
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..200).all(|_| client.ping(&Bound::ms(GENEROUS)).is_ok()))).collect();
        scope.spawn(|| {
            for _ in 0..800 {
                let ping = server.take();
                server.complete(ok(&ping));
            }
        });
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    });
    assert_eq!(client.open_requests().unwrap(), 0);
}

#[test]
fn a_welcome_that_is_not_the_segments_is_refused() {
    let lies: [fn(&mut kvmp_core::wire::Welcome); 3] = [
        |welcome| welcome.segment_id = "00".repeat(16),
        |welcome| welcome.geometry.chunks += 1,
        |welcome| welcome.geometry.chunk_bytes = 5,
    ];
    for lie in lies {
        let mut listener = Listener::new();
        listener.lie = lie;
        let endpoint = listener.endpoint();
        let server = std::thread::spawn(move || listener.accept());
        let refused = Client::connect(&endpoint, &ConnectOptions::new(Role::Scheduler), &Bound::ms(GENEROUS));
        assert!(matches!(refused, Err(ClientError::Attach(_))), "{refused:?}");
        server.join().unwrap();
    }
}

#[test]
fn a_lease_of_another_epoch_and_a_copy_without_a_part_are_refused() {
    let (client, _server, namespace) = opened();
    assert!(matches!(client.check_epoch(41), Err(ClientError::Epoch { lease: 41, session: 42 })));
    client.check_epoch(42).unwrap();
    // A scheduler has no part to copy, so it is told so before any guard is taken.
    assert!(matches!(client.parts_at(&namespace, 0, &[0]), Err(ClientError::Input { name: "part", .. })));
    client.close();
    assert!(matches!(client.arena(), Err(ClientError::Lost(LostWhy::Closed))));
    assert!(matches!(client.prefault(), Err(ClientError::Lost(LostWhy::Closed))));
}

#[test]
fn a_copy_guard_keeps_the_holder_entry_beyond_the_session() {
    let options = ConnectOptions { engine_token: Some(5), part: Some(0), ..ConnectOptions::new(Role::Worker) };
    let (client, server) = Fake::connected_as(&options);
    server.table.set_chunk(ChunkId(0), ChunkWord::Assigned(1));
    let digest: String = spec().digest().iter().map(|byte| format!("{byte:02x}")).collect();
    let namespace = std::thread::scope(|scope| {
        scope.spawn(|| server.answer_join(spec()));
        client.join(3, &digest, &serde_json::Value::Null, &Bound::ms(GENEROUS)).unwrap()
    });
    let copying = client.parts_at(&namespace, 0, &[0]).unwrap();
    client.close();
    assert!(server.holder_is_locked(), "a copy may be under way");
    drop(client);
    assert!(server.holder_is_locked(), "also when nothing else of the session is left");
    drop(copying);
    assert!(!server.holder_is_locked());
}
