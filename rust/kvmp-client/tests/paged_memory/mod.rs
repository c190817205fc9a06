//! Random paged memory and arena, and the byte-by-byte model that copies are held against.

use kvmp_client::copy::Run;
use proptest::prelude::*;

/// Bytes before and behind the paged memory that no copy may touch.
pub const GUARD: usize = 64;

/// A run by its place in `memory` instead of an address.
#[derive(Debug, Clone)]
struct Place {
    at: usize,
    block_stride: isize,
    len: usize,
    part_offset: usize,
}

#[derive(Debug, Clone)]
pub struct Case {
    places: Vec<Place>,
    pub memory: Vec<u8>,
    pub arena: Vec<u8>,
    pub num_blocks: u32,
    pub part_bytes: usize,
    /// (block id, offset in the arena)
    pub pairs: Vec<(u32, u64)>,
    pub threads: Option<usize>,
}

impl Case {
    /// One tensor with its blocks end to end, and an arena with room behind the last part.
    pub fn dense(num_blocks: u32, block_bytes: usize, pairs: &[(u32, u64)]) -> Self {
        let place = Place { at: GUARD, block_stride: block_bytes as isize, len: block_bytes, part_offset: 0 };
        let end = pairs.iter().map(|&(_, offset)| offset.min(8 << 20)).max().unwrap_or(0) as usize;
        Self {
            places: vec![place],
            memory: noise(2 * GUARD + num_blocks as usize * block_bytes, 1),
            arena: noise(end + block_bytes + GUARD, 2),
            num_blocks,
            part_bytes: block_bytes,
            pairs: pairs.to_vec(),
            threads: None,
        }
    }

    pub fn runs(&mut self) -> Vec<Run> {
        let base = self.memory.as_mut_ptr().expose_provenance();
        let run = |place: &Place| Run {
            addr: base + place.at,
            block_stride: place.block_stride,
            len: place.len,
            part_offset: place.part_offset,
        };
        self.places.iter().map(run).collect()
    }

    /// Every (place in memory, place in the arena) that a copy moves.
    fn byte_pairs(&self) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for &(block, offset) in &self.pairs {
            for place in &self.places {
                let from = place.at.wrapping_add_signed(place.block_stride * block as isize);
                let to = offset as usize + place.part_offset;
                pairs.extend((0..place.len).map(|byte| (from + byte, to + byte)));
            }
        }
        pairs
    }
}

pub fn model_store(case: &Case, arena: &mut [u8]) {
    case.byte_pairs().into_iter().for_each(|(from, to)| arena[to] = case.memory[from]);
}

pub fn model_load(case: &Case, memory: &mut [u8]) {
    case.byte_pairs().into_iter().for_each(|(to, from)| memory[to] = case.arena[from]);
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A region of memory: runs side by side in a block, gaps before and behind each; blocks up or down.
#[derive(Debug, Clone)]
struct Region {
    /// (gap before, bytes) of each run.
    runs: Vec<(usize, usize)>,
    gap: usize,
    downwards: bool,
}

fn region() -> impl Strategy<Value = Region> {
    let len = prop_oneof![4 => 1..300usize, 1 => 4000..5000usize];
    let runs = prop::collection::vec((0..40usize, len), 1..5);
    (runs, 0..50usize, any::<bool>()).prop_map(|(runs, gap, downwards)| Region { runs, gap, downwards })
}

/// Random regions, tiled into the part in a random order; random distinct blocks and parts.
pub fn case() -> impl Strategy<Value = Case> {
    let shape = (prop::collection::vec(region(), 1..4), 1..12u32);
    shape.prop_flat_map(|(regions, num_blocks)| {
        let runs: usize = regions.iter().map(|region| region.runs.len()).sum();
        let order = Just((0..runs).collect::<Vec<_>>()).prop_shuffle();
        let blocks = Just((0..num_blocks).collect::<Vec<_>>()).prop_shuffle();
        let gaps = prop::collection::vec(0..70usize, num_blocks as usize);
        let threads = prop_oneof![Just(None), (1..4usize).prop_map(Some)];
        (order, blocks, 0..=num_blocks as usize, gaps, threads, any::<u64>()).prop_map(
            move |(order, blocks, named, gaps, threads, seed)| {
                let (places, end) = place(&regions, num_blocks, &order);
                let part_bytes = places.iter().map(|place| place.len).sum();
                let (pairs, arena_end) = scatter(&blocks[..named], &gaps, part_bytes);
                Case {
                    memory: noise(end + GUARD, seed),
                    arena: noise(arena_end + part_bytes + GUARD, !seed),
                    places,
                    num_blocks,
                    part_bytes,
                    pairs,
                    threads,
                }
            },
        )
    })
}

/// Places in memory of all runs, and where they end; part offsets by `order`.
fn place(regions: &[Region], num_blocks: u32, order: &[usize]) -> (Vec<Place>, usize) {
    let (mut places, mut start) = (Vec::new(), GUARD);
    for region in regions {
        let block: usize = region.runs.iter().map(|(gap, len)| gap + len).sum::<usize>() + region.gap;
        let bytes = block * num_blocks as usize;
        let (block_stride, mut at) =
            if region.downwards { (-(block as isize), start + bytes - block) } else { (block as isize, start) };
        for (gap, len) in &region.runs {
            places.push(Place { at: at + gap, block_stride, len: *len, part_offset: 0 });
            at += gap + len;
        }
        start += bytes;
    }
    let mut part_offset = 0;
    for &index in order {
        places[index].part_offset = part_offset;
        part_offset += places[index].len;
    }
    (places, start)
}

fn scatter(blocks: &[u32], gaps: &[usize], part_bytes: usize) -> (Vec<(u32, u64)>, usize) {
    let mut at = GUARD;
    let mut next = |gap: usize| {
        let offset = at + gap;
        at = offset + part_bytes;
        offset as u64
    };
    let pairs = blocks.iter().zip(gaps).map(|(&block, &gap)| (block, next(gap))).collect();
    (pairs, at)
}
