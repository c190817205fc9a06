//! Where words and records live: the mapped segment in the server, memory in tests.

use crate::geometry::Geometry;
use crate::ids::{ChunkId, SlotId};
use crate::slot::{BlockIdentity, PartSum, SlotState, SlotWord};

/// Life of a chunk: `Cold -> Free -> Assigned -> Draining -> Free`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChunkState {
    /// No memory behind it yet.
    Cold,
    /// Backed, and no slot size has it.
    Free,
    /// Holds slots of `pages` pages.
    Assigned {
        /// 4 KiB pages of a slot.
        pages: u32,
    },
    /// As `Assigned`, but nothing is granted from it; Free when its last slot is.
    Draining {
        /// 4 KiB pages of a slot.
        pages: u32,
    },
}

impl ChunkState {
    /// Whether the chunk has slots.
    #[must_use]
    pub fn has_slots(self) -> bool {
        matches!(self, Self::Assigned { .. } | Self::Draining { .. })
    }
}

/// The slot table: slot words, records, sums of parts and chunk words.
///
/// The store names only slots of chunks it assigned and keeps to `Free -> Writing -> Ready -> Free`
/// (or `Writing -> Free`). The order of memory effects inside a call (DESIGN.md 2, "Order") is the
/// implementor's.
pub trait SlotTable {
    /// Word = Writing with the generation one up, then the record's fields; returns that word.
    fn grant(&mut self, slot: SlotId, identity: &BlockIdentity) -> SlotWord;

    /// The sums of all parts, the check, then word = Ready with the same generation; returns that word.
    fn commit(&mut self, slot: SlotId, sums: &[PartSum]) -> SlotWord;

    /// Word = Free, the generation kept.
    fn evict(&mut self, slot: SlotId);

    /// Stores the time of the last use, in [`Ticks::touched`](crate::clock::Ticks::touched).
    fn touch(&mut self, slot: SlotId, touched: u32);

    /// The slot's word.
    fn word(&self, slot: SlotId) -> SlotWord;

    /// Stores a chunk's state.
    fn set_chunk(&mut self, chunk: ChunkId, state: ChunkState);
}

/// A slot's record in a [`HeapTable`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeapRecord {
    /// The slot word.
    pub word: SlotWord,
    /// What the last grant wrote.
    pub identity: Option<BlockIdentity>,
    /// Time of the last use.
    pub touched: u32,
    /// What the last commit brought, by part.
    pub sums: Vec<PartSum>,
}

/// A slot table in memory. It outlives the store it served, as a segment does.
#[derive(Clone, Debug)]
pub struct HeapTable {
    geometry: Geometry,
    records: std::collections::BTreeMap<SlotId, HeapRecord>,
    chunks: Vec<ChunkState>,
}

impl HeapTable {
    /// A table of Cold chunks and Free words of generation 0.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self { geometry, records: Default::default(), chunks: vec![ChunkState::Cold; geometry.chunks as usize] }
    }

    /// What it is a table of.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// State of a chunk.
    #[must_use]
    pub fn chunk(&self, chunk: ChunkId) -> Option<ChunkState> {
        self.chunks.get(chunk.0 as usize).copied()
    }

    /// Records of a chunk that were granted at least once, in the order of their slots.
    pub fn records(&self, chunk: ChunkId) -> impl Iterator<Item = (SlotId, &HeapRecord)> {
        let first = self.geometry.slot(chunk, 0);
        let last = SlotId(first.0 + (self.geometry.chunk_pages() - 1));
        self.records.range(first..=last).map(|(slot, record)| (*slot, record))
    }

    fn record(&mut self, slot: SlotId) -> &mut HeapRecord {
        let free = SlotWord::new(0, SlotState::Free);
        self.records.entry(slot).or_insert(HeapRecord { word: free, identity: None, touched: 0, sums: Vec::new() })
    }
}

impl SlotTable for HeapTable {
    fn grant(&mut self, slot: SlotId, identity: &BlockIdentity) -> SlotWord {
        let record = self.record(slot);
        record.word = SlotWord::new(record.word.generation() + 1, SlotState::Writing);
        record.identity = Some(*identity);
        record.sums.clear();
        record.word
    }

    fn commit(&mut self, slot: SlotId, sums: &[PartSum]) -> SlotWord {
        let record = self.record(slot);
        record.sums = sums.to_vec();
        record.word = record.word.with_state(SlotState::Ready);
        record.word
    }

    fn evict(&mut self, slot: SlotId) {
        let record = self.record(slot);
        record.word = record.word.with_state(SlotState::Free);
    }

    fn touch(&mut self, slot: SlotId, touched: u32) {
        self.record(slot).touched = touched;
    }

    fn word(&self, slot: SlotId) -> SlotWord {
        self.records.get(&slot).map_or(SlotWord::new(0, SlotState::Free), |record| record.word)
    }

    fn set_chunk(&mut self, chunk: ChunkId, state: ChunkState) {
        if let Some(entry) = self.chunks.get_mut(chunk.0 as usize) {
            *entry = state;
        }
    }
}
