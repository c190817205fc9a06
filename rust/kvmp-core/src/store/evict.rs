//! Making room: inline when a reservation finds no Free slot, never on a timer, never on a pinned or
//! Writing slot, and leaves first, so that a pin on the tip of a run protects the run.

use crate::clock::Ticks;
use crate::ids::{ChunkId, NamespaceId, SlotId};

use super::BlockStore;
use super::answers::{ReserveAnswer, TooFewVictims};
use super::blocks::{BlockState, evictable};
use super::table::SlotTable;

/// Slots that a slice of a clear looks at.
const CLEAR_SLICE: u32 = 16_384;

/// A clear between two slices.
#[derive(Clone, Copy, Debug)]
pub struct ClearCursor {
    namespace: Option<NamespaceId>,
    chunk: u32,
    index: u32,
    /// Blocks evicted so far.
    pub cleared: u64,
}

impl ClearCursor {
    /// From the first chunk on; of one namespace or of all.
    #[must_use]
    pub fn new(namespace: Option<NamespaceId>) -> Self {
        Self { namespace, chunk: 0, index: 0, cleared: 0 }
    }
}

impl<T: SlotTable> BlockStore<T> {
    /// A Free slot, by eviction if need be. `may_move` says whether this request may still try to take
    /// a chunk from another slot size: choosing one looks at every chunk, so it is done once a slice.
    pub(super) fn take_slot(&mut self, class: usize, now: Ticks, may_move: &mut bool) -> Result<SlotId, ReserveAnswer> {
        loop {
            if let Some(slot) = self.free_slot(class) {
                return Ok(slot);
            }
            if self.chunks.warming() {
                return Err(ReserveAnswer::Warming);
            }
            if std::mem::take(may_move) {
                self.take_chunk(class, now);
                continue;
            }
            // A victim in a draining chunk makes no room here, so this may take several.
            if !self.evict_coldest(class) {
                return Err(ReserveAnswer::NoSpace);
            }
        }
    }

    fn evict_coldest(&mut self, class: usize) -> bool {
        let blocks = &self.blocks.hot;
        match self.classes[class].policy.coldest(&|slot| evictable(blocks, slot)) {
            Some(victim) => {
                self.evict_leaf(victim.slot);
                true
            }
            None => false,
        }
    }

    /// When the block that a slot size would evict next was last used.
    pub(super) fn coldest_use(&mut self, class: usize) -> Option<Ticks> {
        let blocks = &self.blocks.hot;
        self.classes[class].policy.coldest(&|slot| evictable(blocks, slot)).map(|victim| victim.last_use)
    }

    /// Evicts a Ready, unpinned block without children.
    pub(super) fn evict_leaf(&mut self, slot: SlotId) {
        self.counters.evictions += 1;
        self.blocks_by_state.ready -= 1;
        self.take_out(slot);
        self.table.evict(slot);
        self.forget(slot);
    }

    /// Takes a block without children out of index, chain and policy.
    pub(super) fn take_out(&mut self, slot: SlotId) {
        self.index.remove(&self.blocks.hot, slot);
        let class = self.class_at(slot);
        let parent = self.blocks.detach(slot);
        self.classes[class].policy.remove(slot, parent);
        if let Some(parent) = parent {
            self.maybe_evictable(parent);
        }
    }

    /// The slot of a block that is out of index and chain becomes Free.
    pub(super) fn forget(&mut self, slot: SlotId) {
        let namespace = self.blocks.hot[slot].namespace;
        if let Some(Some(namespace)) = self.namespaces.get_mut(usize::from(namespace.0)) {
            namespace.slots -= 1;
        }
        self.slot_freed(slot);
    }

    /// Tells the policy if the block may be evicted now.
    pub(super) fn maybe_evictable(&mut self, slot: SlotId) {
        if evictable(&self.blocks.hot, slot) {
            let class = self.class_at(slot);
            self.classes[class].policy.evictable(slot);
        }
    }

    /// Slot size of an assigned slot.
    pub(super) fn class_at(&self, slot: SlotId) -> usize {
        self.chunks.all[(slot.0 >> self.chunk_shift) as usize].class
    }

    /// Evicts a Ready block and all that hangs on it, deepest first; nothing of it is blocked.
    /// Returns how many blocks went.
    pub(super) fn evict_subtree(&mut self, root: SlotId) -> u64 {
        let (mut at, mut count) = (root, 0);
        loop {
            let leaf = self.blocks.first_leaf(at);
            at = self.blocks.hot[leaf].parent;
            self.evict_leaf(leaf);
            count += 1;
            if leaf == root {
                return count;
            }
        }
    }

    /// Marks every block that is pinned or Writing, or that such a block hangs on. The caller hands
    /// what it returns to [`Self::unmark`].
    pub(super) fn mark_blocked(&mut self) -> Vec<SlotId> {
        let mut marked = Vec::new();
        let pinned = self.reads.values().flat_map(|lease| &lease.pins);
        let held = self.writes.values().flat_map(|lease| lease.slots.iter().chain(&lease.guard));
        for &slot in pinned.chain(held) {
            let mut at = slot;
            while at.is_some() && !self.blocks.hot[at].blocked {
                self.blocks.hot[at].blocked = true;
                marked.push(at);
                at = self.blocks.hot[at].parent;
            }
        }
        marked
    }

    pub(super) fn unmark(&mut self, marked: Vec<SlotId>) {
        for slot in marked {
            if self.blocks.has(slot) {
                self.blocks.hot[slot].blocked = false;
            }
        }
    }

    /// Evicts the `n` coldest blocks of slots with `pages` pages, or none if there are not so many.
    pub fn evict(&mut self, pages: u32, n: u64) -> Result<(), TooFewVictims> {
        let class = self.classes.iter().position(|class| class.pages == pages);
        let found = class.map_or(0, |class| self.count_evictable(class));
        if found < n {
            return Err(TooFewVictims { asked: n, found });
        }
        for _ in 0..n {
            class.map(|class| self.evict_coldest(class));
        }
        Ok(())
    }

    /// Blocks that could be evicted one after the other.
    fn count_evictable(&mut self, class: usize) -> u64 {
        let marked = self.mark_blocked();
        let mut found = 0;
        for chunk in self.chunks_of(class) {
            let free = |slot: &SlotId| {
                let block = &self.blocks.hot[*slot];
                block.state == BlockState::Ready && !block.blocked
            };
            found += self.blocks.hot.slots_in(chunk).filter(free).count() as u64;
        }
        self.unmark(marked);
        found
    }

    /// Evicts in place every block of a namespace (of all with `None`) that is Ready and on which
    /// nothing pinned or Writing hangs. Returns how many went.
    pub fn clear(&mut self, namespace: Option<NamespaceId>) -> u64 {
        let mut cursor = ClearCursor::new(namespace);
        while self.clear_step(&mut cursor) {}
        cursor.cleared
    }

    /// One slice of a clear: some ten thousand slots, and whatever hangs on them. Returns whether there are more.
    pub fn clear_step(&mut self, cursor: &mut ClearCursor) -> bool {
        let geometry = self.config.geometry;
        let marked = self.mark_blocked();
        let (mut looked_at, before) = (0, cursor.cleared);
        while looked_at < CLEAR_SLICE && cursor.chunk < geometry.chunks {
            let chunk = ChunkId(cursor.chunk);
            if cursor.index >= self.blocks.hot.slots_of(chunk) {
                (cursor.chunk, cursor.index) = (cursor.chunk + 1, 0);
                continue;
            }
            let slot = geometry.slot(chunk, cursor.index);
            cursor.index += 1;
            looked_at += 1;
            if self.clears(slot, cursor.namespace) {
                cursor.cleared += self.evict_subtree(slot);
            }
        }
        self.unmark(marked);
        self.counters.evictions -= cursor.cleared - before;
        self.counters.cleared += cursor.cleared - before;
        cursor.chunk < geometry.chunks
    }

    fn clears(&self, slot: SlotId, namespace: Option<NamespaceId>) -> bool {
        // A chunk that drained under this very loop has no slots any more.
        self.blocks.hot.get(slot).is_some_and(|block| {
            block.state == BlockState::Ready && !block.blocked && namespace.is_none_or(|n| n == block.namespace)
        })
    }
}
