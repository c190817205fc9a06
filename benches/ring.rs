//! The ring: an entry through a queue; a round trip to a real server beside a pipe's; a lookup of 8,192 hashes.
//!
//! `cargo bench -p kvmp-server --bench ring`. The server runs on threads of this process, which changes nothing for the
//! ring (it is shared memory either way) and lets one command measure both.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on should stop where it is")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{Read, Write};
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use kvmp_client::{Bound, Client, ConnectOptions, Namespace, ReserveList};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::ring::{Consumer, HeapQueue, Producer};
use kvmp_core::wire::Role;
use kvmp_server::Server;
use serde_json::json;

const HASHES: usize = 8192;

fn patience() -> Bound<'static> {
    Bound::ms(20_000)
}

fn queue(c: &mut Criterion) {
    let cells = Arc::new(HeapQueue::new(1024));
    let (mut producer, mut consumer) = (Producer::new(cells.clone()), Consumer::new(cells));
    c.bench_function("queue: push and pop an entry", |b| {
        b.iter(|| {
            producer.push(black_box(&[7; 8])).unwrap().unwrap();
            black_box(consumer.pop().unwrap())
        });
    });
}

/// What any wake-up between two threads costs here: the measure for the round trip.
fn pipe(c: &mut Criterion) {
    let (mut there, mut out) = std::io::pipe().unwrap();
    let (mut back, mut home) = std::io::pipe().unwrap();
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while there.read(&mut byte).is_ok_and(|n| n == 1) {
            home.write_all(&byte).unwrap();
        }
    });
    c.bench_function("pipe ping-pong", |b| {
        b.iter(|| {
            out.write_all(&[1]).unwrap();
            back.read_exact(&mut [0]).unwrap();
        });
    });
    drop(out);
    echo.join().unwrap();
}

fn spec() -> NamespaceSpec {
    NamespaceSpec {
        model: "bench".into(),
        facts: BTreeMap::new(),
        groups: vec![GroupSpec { rule: GroupRule::Prefix, block_tokens: 16, window_tokens: 0, hash_stride: 1 }],
        parts: vec![PartSpec { bytes: vec![4096], layout: json!(null) }],
        salt: String::new(),
    }
}

fn hashes() -> Vec<[u8; 32]> {
    (0..HASHES as u64)
        .map(|i| std::array::from_fn(|b| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (b % 8 * 8)) as u8))
        .collect()
}

/// Has a worker commit every block of the list, whatever bytes lie there.
fn fill(server: &Server, scheduler: &Client, namespace: &Namespace, hashes: &[[u8; 32]]) {
    while scheduler.stats(&patience()).unwrap().contains("\"warming\":true") {
        std::thread::yield_now();
    }
    let options = ConnectOptions {
        engine_token: Some(scheduler.engine_token()),
        part: Some(0),
        ..ConnectOptions::new(Role::Worker)
    };
    let worker = Client::connect(&server.endpoint(), &options, &patience()).unwrap();
    worker.join(namespace.id(), namespace.digest(), &json!(null), &patience()).unwrap();
    let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
    let mut lease = scheduler.reserve(namespace, &list, &patience()).unwrap();
    lease.hand_over();
    let taken = worker.commit(lease.lease_id(), lease.slots(), lease.words(), None, &patience()).unwrap();
    assert_eq!(taken as usize, hashes.len());
}

fn server(c: &mut Criterion) {
    let builder = Server::builder().size(128 << 20).name("bench-ring").tcp("off").ephemeral(true).fresh(true);
    let server = builder.start().unwrap();
    let client = Client::connect(&server.endpoint(), &ConnectOptions::new(Role::Scheduler), &patience()).unwrap();
    c.bench_function("server: ping, both sides parked", |b| b.iter(|| client.ping(&patience()).unwrap()));
    let namespace = client.open(&spec(), &patience()).unwrap();
    let hashes = hashes();
    fill(&server, &client, &namespace, &hashes);
    c.bench_function("server: look up and pin 8,192 hashes, all hits", |b| {
        b.iter(|| {
            let lease = client.lookup(&namespace, &hashes, &patience()).unwrap();
            assert_eq!(lease.tokens() as usize, HASHES * 16);
        });
    });
    c.bench_function("server: look up and pin 32 hashes, all hits", |b| {
        b.iter(|| client.lookup(&namespace, &hashes[..32], &patience()).unwrap());
    });
}

criterion_group!(benches, queue, pipe, server);
criterion_main!(benches);
