//! What the store knows of each slot: 76 bytes, allocated with its chunk.

use crate::geometry::Geometry;
use crate::ids::{BlockKey, ChunkId, GroupId, NamespaceId, SlotId};
use crate::per_slot::PerSlot;
use crate::slot::{SlotState, SlotWord};

/// Life of a slot: `Free -> Writing -> Ready -> Free`, `Writing -> Quarantined -> Free`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BlockState {
    /// In its chunk's list of free slots.
    Free,
    /// In the index and in its chain; parts are open.
    Writing,
    /// In the index and in its chain; every part is committed.
    Ready,
    /// Out of index and chain, its word still Writing, until its parts are closed.
    Quarantined,
}

/// What a lookup reads of a slot: one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Block {
    pub key: BlockKey,
    /// As in the table while the slot is not Free.
    pub word: SlotWord,
    /// The block before it, `NONE` at the head of a chain and outside prefix groups.
    pub parent: SlotId,
    /// One of the blocks after it.
    pub child: SlotId,
    pub position: u32,
    /// Leases that keep it from eviction; Ready blocks only.
    pub pins: u32,
    pub namespace: NamespaceId,
    pub group: GroupId,
    pub state: BlockState,
    /// Scratch of `blocked`: it, or what hangs on it, is pinned or Writing. False between calls.
    pub blocked: bool,
}

/// What only changes of a chain, a lease or a free list read.
#[derive(Clone, Debug)]
pub(super) struct Links {
    /// Next child of the same parent; next of the free list for a Free slot.
    pub next: SlotId,
    /// Previous child of the same parent.
    pub prev: SlotId,
    /// Place in the write lease that holds it, for Writing and Quarantined.
    pub place: u32,
}

const FREE: Block = Block {
    key: BlockKey([0; 32]),
    word: SlotWord(0),
    parent: SlotId::NONE,
    child: SlotId::NONE,
    position: 0,
    pins: 0,
    namespace: NamespaceId(0),
    group: GroupId(0),
    state: BlockState::Free,
    blocked: false,
};

const UNLINKED: Links = Links { next: SlotId::NONE, prev: SlotId::NONE, place: 0 };

/// The slots of all assigned chunks.
#[derive(Debug)]
pub(super) struct Blocks {
    pub hot: PerSlot<Block>,
    pub links: PerSlot<Links>,
}

impl Blocks {
    pub fn new(geometry: &Geometry) -> Self {
        Self { hot: PerSlot::new(geometry), links: PerSlot::new(geometry) }
    }

    pub fn add_chunk(&mut self, chunk: ChunkId, slots: u32) {
        self.hot.add_chunk(chunk, slots, FREE);
        self.links.add_chunk(chunk, slots, UNLINKED);
    }

    pub fn remove_chunk(&mut self, chunk: ChunkId) {
        self.hot.remove_chunk(chunk);
        self.links.remove_chunk(chunk);
    }

    /// Makes the slot Free; the caller has taken it out of chain and index.
    pub fn reset(&mut self, slot: SlotId) {
        self.hot[slot] = FREE;
        self.links[slot] = UNLINKED;
    }

    /// Hangs `slot` on its parent.
    pub fn attach(&mut self, slot: SlotId) {
        let parent = self.hot[slot].parent;
        if parent.is_some() {
            self.hang(slot, parent);
        }
    }

    /// Makes `slot` the first child of `parent`.
    #[inline]
    pub fn hang(&mut self, slot: SlotId, parent: SlotId) {
        let first = std::mem::replace(&mut self.hot[parent].child, slot);
        self.links[slot].next = first;
        if first.is_some() {
            self.links[first].prev = slot;
        }
    }

    /// Takes `slot`, which has no child, off its parent; returns the parent.
    pub fn detach(&mut self, slot: SlotId) -> Option<SlotId> {
        let parent = std::mem::replace(&mut self.hot[slot].parent, SlotId::NONE);
        if !parent.is_some() {
            return None;
        }
        let Links { next, prev, .. } = self.links[slot];
        if prev.is_some() {
            self.links[prev].next = next;
        } else {
            self.hot[parent].child = next;
        }
        if next.is_some() {
            self.links[next].prev = prev;
        }
        (self.links[slot].next, self.links[slot].prev) = (SlotId::NONE, SlotId::NONE);
        Some(parent)
    }

    /// The leaf that a walk along first children ends at.
    pub fn first_leaf(&self, slot: SlotId) -> SlotId {
        let mut at = slot;
        while self.hot[at].child.is_some() {
            at = self.hot[at].child;
        }
        at
    }

    /// Whether `slot` holds the block that was granted with this word, Ready by now.
    pub fn is_ready(&self, slot: SlotId, word: SlotWord) -> bool {
        let ready = word.with_state(SlotState::Ready);
        self.hot.get(slot).is_some_and(|b| b.state == BlockState::Ready && b.word == ready)
    }
}

/// Whether the policy may take the slot: Ready, a leaf, unpinned.
pub(super) fn evictable(blocks: &PerSlot<Block>, slot: SlotId) -> bool {
    let block = &blocks[slot];
    block.state == BlockState::Ready && block.pins == 0 && !block.child.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_takes_what_the_memory_budget_allows() {
        // 16 bytes a slot are the policy's, 12 at most the index's, of 128.
        assert_eq!((size_of::<Block>(), size_of::<Links>()), (64, 12));
    }
}
