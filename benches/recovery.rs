//! Recovery of a full segment as `kvmp serve` does it at start: 32,768 and 1M slots of 4 KiB.
//!
//! `cargo bench -p kvmp-server --bench recovery`. Each sample is a process of its own, as a start is: what it says of its
//! recovery (from the first look at the file until the index is whole), and the time from its start to its ready line.
//! "Filled once": chains lie in the order of their slots. "Aged": any block lies in any slot, as after long eviction.
//! A segment that lacks memory is not gone on with, so the arena is backed: 1M slots take 4 GiB of memory for a while.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on should stop where it is")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kvmp_core::geometry::{Geometry, PAGE};
use kvmp_core::ids::{BlockKey, ChunkId, GroupId, NamespaceId, SlotId};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::segment::{
    Access, ChunkWord, Layout, Mapping, NamespaceEntry, SegmentHeader, SegmentId, TableMap, boot_id,
};
use kvmp_core::slot::BlockIdentity;
use rustix::fs::{FallocateFlags, fallocate};

const ARENA_DIR: &str = "/dev/shm";
/// Blocks of a chain: a prompt of 4,096 tokens.
const CHAIN: u32 = 256;

fn splitmix(mut x: u64) -> u64 {
    x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Looks like a hash.
fn key(n: u32) -> BlockKey {
    let words: [u64; 4] = std::array::from_fn(|i| splitmix(u64::from(n) * 4 + i as u64));
    BlockKey(std::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8]))
}

fn spec() -> NamespaceSpec {
    let group = GroupSpec { rule: GroupRule::Prefix, block_tokens: 16, window_tokens: 0, hash_stride: 1 };
    let part = PartSpec { bytes: vec![PAGE], layout: serde_json::Value::Null };
    let (facts, salt) = (BTreeMap::new(), String::new());
    NamespaceSpec { model: "bench".into(), facts, groups: vec![group], parts: vec![part], salt }
}

/// The slot of each block, in the order of the blocks.
fn slots(count: u32, aged: bool) -> Vec<SlotId> {
    let mut slots: Vec<SlotId> = (0..count).map(SlotId).collect();
    if aged {
        slots.sort_unstable_by_key(|slot| splitmix(u64::from(slot.0)));
    }
    slots
}

/// A full segment of `count` slots under a name of its own; gone when dropped.
struct Segment {
    name: String,
    count: u32,
}

impl Segment {
    fn new(count: u32, aged: bool) -> Self {
        let segment = Self { name: format!("crash-bench-{}-{count}-{aged}", std::process::id()), count };
        let layout = Layout::new(Geometry::new(u64::from(count) * PAGE, None).unwrap());
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(segment.path()).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, layout.file_bytes()).unwrap();
        let table = TableMap::new(Mapping::new(&file, 0, layout.table_bytes(), Access::ReadWrite).unwrap(), layout);
        table.set_header(&SegmentHeader::new(&layout, SegmentId([7; 16]), boot_id().unwrap(), 0));
        let (digest, spec) = (spec().digest(), spec().canonical_json());
        table.set_namespace(NamespaceId(0), &NamespaceEntry { digest, spec });
        (0..layout.geometry.chunks).for_each(|chunk| table.set_chunk(ChunkId(chunk), ChunkWord::Assigned(1)));
        fill(&table, &slots(count, aged));
        segment
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(ARENA_DIR).join(format!("{}.kvmp", self.name))
    }

    /// Starts a server on it; how long its recovery took, and how long it took to be ready.
    fn start(&self) -> (Duration, Duration) {
        let socket = std::env::temp_dir().join(format!("{}.sock", self.name));
        let begun = Instant::now();
        let mut server = Command::new(env!("CARGO_BIN_EXE_kvmp"))
            .args(["serve", "--tcp", "off", "--arena-dir", ARENA_DIR, "--name", &self.name])
            .args(["--size", &(u64::from(self.count) * PAGE).to_string(), "--socket"])
            .arg(&socket)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(server.stderr.take().unwrap()).lines().map_while(Result::ok);
        let is_told = |line: &String| line.contains("recovered in") || line.contains("ready:");
        let recovered = lines.by_ref().find(is_told).unwrap();
        assert!(recovered.contains(&format!("{} blocks kept, 0 dropped", self.count)), "{recovered}");
        lines.find(|line| line.contains("ready:")).unwrap();
        let ready = begun.elapsed();
        server.kill().unwrap();
        server.wait().unwrap();
        let _ = std::fs::remove_file(socket);
        (said(&recovered), ready)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.path());
    }
}

/// The milliseconds that a server's line names.
fn said(line: &str) -> Duration {
    let after = line.split("recovered in ").nth(1).unwrap();
    Duration::from_secs_f64(after.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e3)
}

/// Chains of `CHAIN` blocks, all Ready, each used at its own time, in the order of their making.
fn fill(table: &TableMap, slots: &[SlotId]) {
    for (block, slot) in (0u32..).zip(slots) {
        let position = block % CHAIN;
        let parent = if position == 0 { SlotId::NONE } else { slots[block as usize - 1] };
        let (namespace, group) = (NamespaceId(0), GroupId(0));
        let record = table.record(*slot).unwrap();
        record.grant(&BlockIdentity { key: key(block), namespace, group, position, parent, bytes: PAGE as u32 });
        record.touch(block / CHAIN);
        record.commit();
    }
}

fn recovery(c: &mut Criterion) {
    let mut group = c.benchmark_group("recovery");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(100));
    for (count, aged) in [(32_768, false), (32_768, true), (1 << 20, false), (1 << 20, true)] {
        let segment = Segment::new(count, aged);
        let what = format!("{count} slots, {}", if aged { "aged" } else { "filled once" });
        let mut samples = Vec::new();
        group.bench_function(BenchmarkId::new("index", &what), |b| {
            b.iter_custom(|n| {
                let index: Vec<Duration> = (0..n).map(|_| segment.start().0).collect();
                samples.extend_from_slice(&index);
                index.iter().sum()
            });
        });
        // On a machine that others use, the mean is theirs as much as ours.
        samples.sort_unstable();
        if let (Some(least), Some(median)) = (samples.first(), samples.get(samples.len() / 2)) {
            println!("least {least:?}, median {median:?} of {}\n", samples.len());
        }
        group.bench_function(BenchmarkId::new("ready", &what), |b| {
            b.iter_custom(|n| (0..n).map(|_| segment.start().1).sum());
        });
    }
    group.finish();
}

criterion_group!(benches, recovery);
criterion_main!(benches);
