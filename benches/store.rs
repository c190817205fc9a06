//! The block store alone: lookup of 8,192 keys in an index of 262k blocks, and steady-state eviction.
//!
//! `cargo bench -p kvmp-core --bench store`. "Cold" walks another 256 MiB between two lookups.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvmp_core::clock::Ticks;
use kvmp_core::geometry::{Geometry, PAGE};
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, LeaseId, NamespaceId, PartId, SlotId};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::policy;
use kvmp_core::slot::{BlockIdentity, PartSum, SlotState, SlotWord};
use kvmp_core::store::{BlockStore, ChunkState, ReserveAnswer, SlotTable, StoreConfig};

const ENGINE: EngineToken = EngineToken(1);
const NS: NamespaceId = NamespaceId(0);
const BLOCKS: u64 = 262_144;
const RUN: u64 = 8_192;
/// Keys that the server hands over at a time.
const SLICE: usize = 1_024;

/// Words by slot number: the cheapest table there can be, so that the store is what is measured.
struct Words(Vec<SlotWord>);

impl SlotTable for Words {
    fn grant(&mut self, slot: SlotId, _: &BlockIdentity) -> SlotWord {
        let word = &mut self.0[slot.0 as usize];
        *word = SlotWord::new(word.generation() + 1, SlotState::Writing);
        *word
    }
    fn commit(&mut self, slot: SlotId, _: &[PartSum]) -> SlotWord {
        let word = &mut self.0[slot.0 as usize];
        *word = word.with_state(SlotState::Ready);
        *word
    }
    fn evict(&mut self, slot: SlotId) {
        let word = &mut self.0[slot.0 as usize];
        *word = word.with_state(SlotState::Free);
    }
    fn touch(&mut self, _: SlotId, _: u32) {}
    fn word(&self, slot: SlotId) -> SlotWord {
        self.0[slot.0 as usize]
    }
    fn set_chunk(&mut self, _: ChunkId, _: ChunkState) {}
}

/// Looks like a hash: splitmix64 four times.
fn key(n: u64) -> BlockKey {
    let mut bytes = [0; 32];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let mut x = (n * 4 + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(x ^ (x >> 31)).to_le_bytes());
    }
    BlockKey(bytes)
}

fn run_keys(run: u64) -> Vec<BlockKey> {
    (run * RUN..(run + 1) * RUN).map(key).collect()
}

fn spec() -> NamespaceSpec {
    let group = GroupSpec { rule: GroupRule::Prefix, block_tokens: 16, window_tokens: 0, hash_stride: 1 };
    let part = PartSpec { bytes: vec![PAGE], layout: serde_json::Value::Null };
    let (facts, salt) = (BTreeMap::new(), String::new());
    NamespaceSpec { model: "bench".into(), facts, groups: vec![group], parts: vec![part], salt }
}

fn store() -> BlockStore<Words> {
    let geometry = Geometry::new(BLOCKS * PAGE, None).unwrap_or_else(|e| panic!("{e}"));
    let words = Words(vec![SlotWord(0); BLOCKS as usize]);
    let lru = policy::factory("lru").unwrap_or_else(|e| panic!("{e}"));
    let mut store = BlockStore::new(StoreConfig::new(geometry), words, lru);
    (0..geometry.chunks).for_each(|chunk| store.chunk_backed(ChunkId(chunk)));
    store.add_namespace(NS, &spec()).unwrap_or_else(|e| panic!("{e}"));
    store
}

/// Stores a whole run as one engine's request does.
fn fill(store: &mut BlockStore<Words>, keys: &[BlockKey], now: Ticks) {
    let begun = store.reserve_begin(ENGINE, NS, GroupId(0), None, 0, now);
    let mut cursor = begun.unwrap_or_else(|e| panic!("{e}"));
    let mut answers = Vec::with_capacity(keys.len());
    keys.chunks(SLICE).for_each(|keys| store.reserve_step(&mut cursor, keys, &mut answers));
    let Some(lease) = store.reserve_finish(cursor).lease else { return };
    let granted: Vec<_> = answers
        .into_iter()
        .filter_map(|answer| match answer {
            ReserveAnswer::Granted(slot, word) => Some((slot, word, PartSum::default())),
            _ => None,
        })
        .collect();
    store.commit(ENGINE, lease, PartId(0), &granted);
}

fn full_store() -> BlockStore<Words> {
    let mut store = store();
    (0..BLOCKS / RUN).for_each(|run| fill(&mut store, &run_keys(run), Ticks(run)));
    store
}

fn lookup(store: &mut BlockStore<Words>, keys: &[BlockKey], now: Ticks) -> Option<LeaseId> {
    let mut cursor = store.lookup_begin(ENGINE, NS, now).unwrap_or_else(|e| panic!("{e}"));
    for keys in keys.chunks(SLICE) {
        if !store.lookup_step(&mut cursor, keys) {
            break;
        }
    }
    let reply = black_box(store.lookup_finish(cursor));
    assert_eq!(u64::from(reply.tokens), RUN * 16);
    reply.lease
}

fn timed_lookup(store: &mut BlockStore<Words>, keys: &[BlockKey]) -> Duration {
    let start = Instant::now();
    let lease = lookup(store, keys, Ticks(100));
    let took = start.elapsed();
    lease.map(|lease| store.release(ENGINE, lease));
    took
}

fn lookups(c: &mut Criterion) {
    let mut store = full_store();
    let runs: Vec<_> = (0..BLOCKS / RUN).map(run_keys).collect();
    let mut group = c.benchmark_group("store");
    group.throughput(Throughput::Elements(RUN)).sample_size(20);
    group.bench_function("lookup 8192 of 262k, warm", |b| {
        b.iter_custom(|n| (0..n).map(|_| timed_lookup(&mut store, &runs[7])).sum());
    });
    let mut other = vec![0u64; 32 << 20];
    group.bench_function("lookup 8192 of 262k, cold", |b| {
        b.iter_custom(|n| {
            let cold = |i: u64| {
                other.iter_mut().step_by(8).for_each(|word| *word = word.wrapping_add(1));
                timed_lookup(&mut store, &runs[i as usize % runs.len()])
            };
            (0..n).map(cold).sum()
        });
    });
    group.finish();
}

fn steady_state(c: &mut Criterion) {
    let mut store = full_store();
    let mut run = BLOCKS / RUN;
    let mut group = c.benchmark_group("store");
    group.throughput(Throughput::Elements(RUN)).sample_size(20);
    group.bench_function("reserve + commit + evict 8192, full", |b| {
        b.iter_custom(|n| {
            let mut took = Duration::ZERO;
            for _ in 0..n {
                let keys = run_keys(run);
                run += 1;
                let start = Instant::now();
                fill(&mut store, &keys, Ticks(run));
                took += start.elapsed();
            }
            took
        });
    });
    group.finish();
}

criterion_group!(benches, lookups, steady_state);
criterion_main!(benches);
