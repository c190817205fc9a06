//! Chunks and slot sizes: `Cold -> Free -> Assigned(pages) -> Draining -> Free`.

use crate::clock::Ticks;
use crate::geometry::Geometry;
use crate::ids::{ChunkId, SlotId};
use crate::policy::EvictionPolicy;

use super::table::{ChunkState, SlotTable};
use super::{BlockStore, blocks::Blocks};

/// One chunk.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub state: ChunkState,
    /// Index of the slot size that has it, while Assigned or Draining.
    pub class: usize,
    /// Head of the list of slots that were used and are Free again.
    pub free: SlotId,
    /// Slots from this index on were never used since the chunk was assigned.
    pub fresh: u32,
    /// Slots that are not Free.
    pub used: u32,
    /// Last time a block in it was granted or hit: no block in it is hotter.
    pub heat: Ticks,
    /// In its class's list of open chunks.
    pub listed: bool,
}

const COLD: Chunk =
    Chunk { state: ChunkState::Cold, class: 0, free: SlotId::NONE, fresh: 0, used: 0, heat: Ticks(0), listed: false };

/// All chunks.
#[derive(Debug)]
pub(super) struct Chunks {
    pub all: Vec<Chunk>,
    /// Free chunks, the last one is taken first.
    pub free: Vec<ChunkId>,
    pub cold: u32,
    /// More chunks may come.
    pub backing: bool,
}

impl Chunks {
    pub fn new(geometry: &Geometry) -> Self {
        let all = vec![COLD; geometry.chunks as usize];
        Self { all, free: Vec::new(), cold: geometry.chunks, backing: true }
    }

    pub fn warming(&self) -> bool {
        self.backing && self.cold > 0
    }

    pub fn get(&mut self, chunk: ChunkId) -> &mut Chunk {
        &mut self.all[chunk.0 as usize]
    }
}

/// A slot size: every namespace and group whose slots have these pages.
pub(super) struct SizeClass {
    pub pages: u32,
    /// Slots of this size in a chunk.
    pub slots: u32,
    /// Assigned or Draining chunks.
    pub chunks: u32,
    /// Chunks that may have a Free slot; those that turn out to have none leave it then.
    pub open: Vec<ChunkId>,
    pub policy: Box<dyn EvictionPolicy>,
}

impl<T: SlotTable> BlockStore<T> {
    /// A Cold chunk has got memory.
    pub fn chunk_backed(&mut self, chunk: ChunkId) {
        let Some(entry) = self.chunks.all.get(chunk.0 as usize) else { return };
        if entry.state == ChunkState::Cold {
            self.chunks.cold -= 1;
            self.chunk_freed(chunk);
        }
    }

    /// No Cold chunk will get memory any more: answers say no space instead of warming from now on.
    pub fn backing_ended(&mut self) {
        self.chunks.backing = false;
    }

    /// Index of the slot size with these pages, made on first use.
    pub(super) fn class_of(&mut self, pages: u32) -> usize {
        if let Some(class) = self.classes.iter().position(|class| class.pages == pages) {
            return class;
        }
        let slots = self.config.geometry.slots_per_chunk(pages);
        let policy = (self.policy)(&self.config.geometry);
        self.classes.push(SizeClass { pages, slots, chunks: 0, open: Vec::new(), policy });
        self.classes.len() - 1
    }

    pub(super) fn set_chunk(&mut self, chunk: ChunkId, state: ChunkState) {
        self.chunks.get(chunk).state = state;
        self.table.set_chunk(chunk, state);
    }

    /// Gives a chunk of Free slots to a slot size.
    pub(super) fn assign(&mut self, chunk: ChunkId, class: usize) {
        let SizeClass { pages, slots, .. } = self.classes[class];
        self.set_chunk(chunk, ChunkState::Assigned { pages });
        let entry = self.chunks.get(chunk);
        (entry.class, entry.free, entry.fresh, entry.used) = (class, SlotId::NONE, 0, 0);
        entry.listed = true;
        self.blocks.add_chunk(chunk, slots);
        self.index.reserve(&self.blocks.hot, slots as usize);
        let class = &mut self.classes[class];
        class.chunks += 1;
        class.open.push(chunk);
        class.policy.add_chunk(chunk, slots);
    }

    /// Takes a chunk whose slots are all Free from its slot size.
    pub(super) fn unassign(&mut self, chunk: ChunkId) {
        let class = &mut self.classes[self.chunks.all[chunk.0 as usize].class];
        class.chunks -= 1;
        class.open.retain(|open| *open != chunk);
        class.policy.remove_chunk(chunk);
        self.blocks.remove_chunk(chunk);
        self.chunk_freed(chunk);
    }

    fn chunk_freed(&mut self, chunk: ChunkId) {
        self.set_chunk(chunk, ChunkState::Free);
        self.chunks.get(chunk).listed = false;
        self.chunks.get(chunk).heat = Ticks(0);
        self.chunks.free.push(chunk);
    }

    /// A Free slot of a slot size, from its chunks or a Free one; still in state Free.
    pub(super) fn free_slot(&mut self, class: usize) -> Option<SlotId> {
        while let Some(&chunk) = self.classes[class].open.last() {
            if let Some(slot) = self.pop_free(chunk) {
                return Some(slot);
            }
            self.chunks.get(chunk).listed = false;
            self.classes[class].open.pop();
        }
        let chunk = self.chunks.free.pop()?;
        self.assign(chunk, class);
        self.pop_free(chunk)
    }

    fn pop_free(&mut self, chunk: ChunkId) -> Option<SlotId> {
        let slots = self.blocks.hot.slots_of(chunk);
        let entry = &mut self.chunks.all[chunk.0 as usize];
        let slot = if !matches!(entry.state, ChunkState::Assigned { .. }) {
            return None;
        } else if entry.free.is_some() {
            let slot = entry.free;
            entry.free = self.blocks.links[slot].next;
            slot
        } else if entry.fresh < slots {
            entry.fresh += 1;
            self.config.geometry.slot(chunk, entry.fresh - 1)
        } else {
            return None;
        };
        entry.used += 1;
        Some(slot)
    }

    /// The slot is Free from now on; its chunk is too, if it drains and this was its last block.
    pub(super) fn slot_freed(&mut self, slot: SlotId) {
        let Some(chunk) = self.config.geometry.chunk_of(slot) else { return };
        self.blocks.reset(slot);
        let entry = &mut self.chunks.all[chunk.0 as usize];
        self.blocks.links[slot].next = std::mem::replace(&mut entry.free, slot);
        entry.used -= 1;
        if matches!(entry.state, ChunkState::Draining { .. }) {
            if entry.used == 0 {
                self.drained(chunk);
            }
        } else if !std::mem::replace(&mut entry.listed, true) {
            self.classes[entry.class].open.push(chunk);
        }
    }

    /// A block in this slot was granted or hit.
    #[inline]
    pub(super) fn heat(&mut self, slot: SlotId, now: Ticks) {
        self.chunks.all[(slot.0 >> self.chunk_shift) as usize].heat = now;
    }
}

impl Blocks {
    /// Whether the slot lies in an assigned chunk.
    pub fn has(&self, slot: SlotId) -> bool {
        self.hot.get(slot).is_some()
    }
}
