//! Store and load between paged memory and a populated tmpfs mapping, against one plain `memcpy` of the same bytes.
//!
//! `cargo bench -p kvmp-client --bench copy`. Each round moves other blocks of 512 MiB, so nothing is in a cache.

#![expect(clippy::expect_used, reason = "a benchmark ends at the first thing that goes wrong")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvmp_client::copy::{ArenaView, BlockLayout, CopyError, Run, Touch, load, populate, store};
use memmap2::{MmapOptions, MmapRaw};

const BYTES: usize = 512 << 20;
const ROUND: usize = 64 << 20;

struct Bench {
    kv: MmapRaw,
    arena: MmapRaw,
    /// Runs of every block.
    layers: usize,
    /// Bytes of a run.
    run: usize,
    round: usize,
}

impl Bench {
    fn new(layers: usize, run: usize) -> Self {
        let file = tempfile::tempfile_in("/dev/shm").expect("a file in /dev/shm");
        file.set_len(BYTES as u64).expect("its length");
        let arena = MmapRaw::map_raw(&file).expect("the arena's mapping");
        let kv = MmapOptions::new().len(BYTES).map_anon().expect("the engine's memory").into();
        let bench = Self { kv, arena, layers, run, round: 0 };
        for map in [&bench.kv, &bench.arena] {
            populate(map.as_mut_ptr(), BYTES, Touch::Write, || true).expect("its pages");
        }
        bench
    }

    /// vLLM's default: all blocks of a layer, then the next layer.
    fn layout(&self) -> BlockLayout {
        let (base, blocks) = (self.kv.as_mut_ptr().expose_provenance(), BYTES / (self.layers * self.run));
        let run = |layer: usize| Run {
            addr: base + layer * blocks * self.run,
            block_stride: self.run as isize,
            len: self.run,
            part_offset: layer * self.run,
        };
        BlockLayout::new((0..self.layers).map(run).collect(), blocks as u32).expect("a layout")
    }

    /// The next 64 MiB of blocks, in an order that is neither's memory order.
    fn pairs(&mut self, layout: &BlockLayout) -> Vec<(u32, u64)> {
        let (part, blocks) = (layout.part_bytes(), layout.num_blocks() as usize);
        let count = ROUND / part;
        self.round += 1;
        let place = |at: usize| {
            let at = at + self.round * count;
            ((at * 37 % blocks) as u32, ((at * 53 + 11) % blocks * part) as u64)
        };
        (0..count).map(place).collect()
    }

    fn copy(&mut self, layout: &BlockLayout, is_store: bool, threads: Option<usize>) -> Result<(), CopyError> {
        let pairs = self.pairs(layout);
        let arena = ArenaView::new(self.arena.as_mut_ptr(), BYTES);
        let op = if is_store { store } else { load };
        // SAFETY: both mappings are this benchmark's own, live and apart.
        unsafe { op(layout, arena, &pairs, threads) }
    }

    fn memcpy(&mut self) {
        self.round += 1;
        let at = self.round * ROUND % BYTES;
        let (src, dst) = (self.kv.as_mut_ptr().wrapping_add(at), self.arena.as_mut_ptr().wrapping_add(at));
        // SAFETY: both mappings are this benchmark's own, live and apart, and `at + ROUND` is within them.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, ROUND) };
    }
}

fn copies(criterion: &mut Criterion) {
    let shapes =
        [("32 runs of 64 KiB", 32, 64 << 10), ("1 run of 2 MiB", 1, 2 << 20), ("512 runs of 4 KiB", 512, 4096)];
    for (name, layers, run) in shapes {
        let mut bench = Bench::new(layers, run);
        let layout = bench.layout();
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(ROUND as u64)).sample_size(20);
        group.bench_function("plain memcpy", |b| b.iter(|| bench.memcpy()));
        for threads in [Some(1), None] {
            let label = threads.map_or("as many threads as help".into(), |n| format!("{n} thread"));
            for (op, is_store) in [("store", true), ("load", false)] {
                group.bench_function(BenchmarkId::new(op, &label), |b| {
                    b.iter(|| bench.copy(&layout, is_store, threads).expect("a copy"));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, copies);
criterion_main!(benches);
