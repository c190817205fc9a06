//! Store and load: check everything, then move.

use std::ops::Range;

use kvmp_core::sync::{Ordering, fence};

use super::check::{check_load, check_store};
use super::threads::{share, threads_for};
use super::{ArenaView, BlockLayout, CopyError, Run, bytes};

/// Copies of at least this many bytes go past the caches: shorter ones may still be there when they are read.
const STREAM_TOTAL: usize = 1 << 20;

/// Copies blocks of the engine's memory to the arena: `pairs` are (block id, offset in the arena of its part).
///
/// Blocks until the bytes are visible to every process; `threads` left out takes as many as help.
///
/// # Errors
/// A block id or a part out of range, or parts that overlap; then no byte has moved.
///
/// # Safety
/// Until this returns, the memory that `layout` names is mapped and readable and nobody writes the blocks named;
/// the arena is mapped, writable and backed, and apart from that memory; an open write lease covers the parts.
pub unsafe fn store(
    layout: &BlockLayout,
    arena: ArenaView,
    pairs: &[(u32, u64)],
    threads: Option<usize>,
) -> Result<(), CopyError> {
    let copy = Copy::new(Direction::Store, layout, arena, pairs)?;
    let threads = thread_count(threads, copy.total)?;
    // Release: no byte below may be seen by one who has not yet seen the slot granted.
    fence(Ordering::Release);
    // SAFETY: bounds were checked; the caller vouches for both memories.
    unsafe { copy.run(threads) };
    Ok(())
}

/// Copies parts from the arena into blocks of the engine's memory: `pairs` are (block id, offset in the arena).
///
/// The bytes are garbage until the caller has fenced (Acquire) and found each slot word unchanged.
/// Blocks until done; `threads` left out takes as many as help.
///
/// # Errors
/// A block id or a part out of range, or a block named twice; then no byte has moved.
///
/// # Safety
/// Until this returns, the memory that `layout` names is mapped and writable and nobody else touches the blocks
/// named; the arena is mapped, readable and backed, and apart from that memory. Others may write the arena.
pub unsafe fn load(
    layout: &BlockLayout,
    arena: ArenaView,
    pairs: &[(u32, u64)],
    threads: Option<usize>,
) -> Result<(), CopyError> {
    let copy = Copy::new(Direction::Load, layout, arena, pairs)?;
    let threads = thread_count(threads, copy.total)?;
    // SAFETY: bounds were checked; the caller vouches for both memories.
    unsafe { copy.run(threads) };
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Store,
    Load,
}

/// A copy whose bounds hold: every block id is in the layout and every part in the arena.
struct Copy<'a> {
    direction: Direction,
    layout: &'a BlockLayout,
    arena: ArenaView,
    pairs: &'a [(u32, u64)],
    /// Bytes to move.
    total: usize,
}

impl<'a> Copy<'a> {
    fn new(
        direction: Direction,
        layout: &'a BlockLayout,
        arena: ArenaView,
        pairs: &'a [(u32, u64)],
    ) -> Result<Self, CopyError> {
        match direction {
            Direction::Store => check_store(layout, arena, pairs)?,
            Direction::Load => check_load(layout, arena, pairs)?,
        }
        // Saturates only if pairs repeat, and both directions refuse that next.
        let total = pairs.len().saturating_mul(layout.part_bytes());
        Ok(Self { direction, layout, arena, pairs, total })
    }

    /// # Safety
    /// As [`store`] or [`load`], whichever the direction is.
    unsafe fn run(&self, threads: usize) {
        share(self.total, threads, |piece| {
            // SAFETY: `share` hands out pieces of `0..total`; the caller vouches for the memory.
            unsafe { self.move_piece(piece) };
            bytes::drain();
        });
    }

    /// Moves a range of the copy's bytes, counted over all parts end to end.
    ///
    /// # Safety
    /// As [`Copy::run`]; `piece` lies in `0..total`.
    unsafe fn move_piece(&self, piece: Range<usize>) {
        let part_bytes = self.layout.part_bytes();
        let mut at = piece.start;
        while at < piece.end {
            let from = at % part_bytes;
            let to = part_bytes.min(from + (piece.end - at));
            // SAFETY: the caller's obligations, passed on; `from..to` lies in the part.
            unsafe { self.move_in_part(self.pairs[at / part_bytes], from..to) };
            at += to - from;
        }
    }

    /// # Safety
    /// As [`Copy::run`]; `within` lies in `0..part_bytes`.
    unsafe fn move_in_part(&self, (block, offset): (u32, u64), within: Range<usize>) {
        for run in self.layout.runs_from(within.start) {
            if run.part_offset >= within.end {
                break;
            }
            let from = within.start.max(run.part_offset);
            let to = within.end.min(run.part_end());
            // SAFETY: the caller's obligations, passed on; `from..to` lies in this run.
            unsafe { self.move_in_run(run, block, offset, from..to) };
        }
    }

    /// # Safety
    /// As [`Copy::run`]; `within` lies in the run's range of the part.
    unsafe fn move_in_run(&self, run: &Run, block: u32, offset: u64, within: Range<usize>) {
        let stream = self.total >= STREAM_TOTAL;
        let memory = run.addr_of(block) + (within.start - run.part_offset);
        let arena = self.arena.base() + offset as usize + within.start;
        let (src, dst) = match self.direction {
            Direction::Store => (memory, arena),
            Direction::Load => (arena, memory),
        };
        let (src, dst) = (std::ptr::with_exposed_provenance(src), std::ptr::with_exposed_provenance_mut(dst));
        // SAFETY: the checks put the part in the arena and the block in the layout, whose runs are in bounds;
        // the caller vouches that both are mapped and apart, and `run` drains.
        unsafe { bytes::copy(src, dst, within.len(), stream) };
    }
}

fn thread_count(threads: Option<usize>, total: usize) -> Result<usize, CopyError> {
    match threads {
        Some(0) => Err(CopyError::NoThreads),
        Some(threads) => Ok(threads),
        None => Ok(threads_for(total)),
    }
}
