//! A chunk moves from one slot size to another: one drains at a time.
//!
//! A slot size may take a chunk when it has none, or when another's coldest chunk is colder than its own
//! coldest block. Nothing is granted from a draining chunk; its Ready blocks go, with what hangs on
//! them, as soon as nothing of that is pinned or Writing.

use crate::clock::Ticks;
use crate::ids::{ChunkId, SlotId};

use super::BlockStore;
use super::blocks::BlockState;
use super::table::{ChunkState, SlotTable};

/// Blocks evicted by a draining in one call, so that a call stays short.
const SLICE: u64 = 4096;

/// The chunk that drains.
#[derive(Debug)]
pub(super) struct Drain {
    pub chunk: ChunkId,
    /// Slots with this index and above were looked at since something was unblocked.
    below: u32,
    /// All were, and what is left is blocked: wait until a pin or a writer goes.
    waiting: bool,
}

impl<T: SlotTable> BlockStore<T> {
    /// Tries to get a chunk for `class` from another slot size; it may take several calls.
    pub(super) fn take_chunk(&mut self, class: usize, now: Ticks) {
        if self.draining.is_none()
            && let Some(chunk) = self.chunk_to_take(class, now)
        {
            self.start_drain(chunk);
        }
        self.drain_some();
    }

    fn chunk_to_take(&mut self, class: usize, now: Ticks) -> Option<ChunkId> {
        let (chunk, temperature) = self.coldest_chunk_of_others(class)?;
        // With no block of its own to evict (all pinned or Writing) it counts as used right now.
        let own = self.coldest_use(class).unwrap_or(now);
        let takes = self.classes[class].chunks == 0 || temperature.is_none_or(|t| t < own);
        takes.then_some(chunk)
    }

    /// With its heat, `None` for a chunk without blocks.
    fn coldest_chunk_of_others(&self, class: usize) -> Option<(ChunkId, Option<Ticks>)> {
        let chunks = self.chunks.all.iter().enumerate();
        let others = chunks.filter(|(_, c)| c.class != class && matches!(c.state, ChunkState::Assigned { .. }));
        others.map(|(id, c)| (ChunkId(id as u32), (c.used > 0).then_some(c.heat))).min_by_key(|(id, heat)| (*heat, *id))
    }

    fn start_drain(&mut self, chunk: ChunkId) {
        let pages = self.classes[self.chunks.get(chunk).class].pages;
        self.counters.chunk_moves += 1;
        if self.chunks.get(chunk).used == 0 {
            self.unassign(chunk);
            return;
        }
        self.set_chunk(chunk, ChunkState::Draining { pages });
        let below = self.blocks.hot.slots_of(chunk);
        self.draining = Some(Drain { chunk, below, waiting: false });
    }

    /// The last block left the draining chunk.
    pub(super) fn drained(&mut self, chunk: ChunkId) {
        self.draining = None;
        self.unassign(chunk);
    }

    /// A pin was dropped or a slot left Writing: what was blocked may go on.
    pub(super) fn wake_drain(&mut self) {
        if let Some(drain) = &mut self.draining {
            drain.waiting = false;
        }
    }

    /// Goes on with the chunk that drains, if one does and something may have changed.
    /// Returns whether there is more to do right away.
    pub fn drain_some(&mut self) -> bool {
        match &self.draining {
            Some(drain) if !drain.waiting => {}
            _ => return false,
        }
        let marked = self.mark_blocked();
        let more = self.drain_slice();
        self.unmark(marked);
        more
    }

    fn drain_slice(&mut self) -> bool {
        let mut evicted = 0;
        // From the end: chains were mostly granted in order, so tails come first.
        while let Some((slot, chunk)) = self.next_to_drain() {
            let block = &self.blocks.hot[slot];
            if block.state == BlockState::Ready && !block.blocked {
                evicted += self.evict_subtree(slot);
            }
            if evicted >= SLICE && self.draining.as_ref().is_some_and(|drain| drain.chunk == chunk) {
                return true;
            }
        }
        false
    }

    fn next_to_drain(&mut self) -> Option<(SlotId, ChunkId)> {
        let drain = self.draining.as_mut()?;
        if drain.below == 0 {
            drain.below = self.blocks.hot.slots_of(drain.chunk);
            drain.waiting = true;
            return None;
        }
        drain.below -= 1;
        Some((self.config.geometry.slot(drain.chunk, drain.below), drain.chunk))
    }
}
