//! The store's slot table over the mapped segment.

use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::segment::{ChunkWord, TableMap};
use kvmp_core::slot::{BlockIdentity, PartSum, SlotState, SlotWord};
use kvmp_core::store::{ChunkState, SlotTable};

/// Words and records as every client sees them. Each step's order of effects is `RecordCells`'.
#[derive(Debug)]
pub struct SegmentTable {
    map: TableMap,
}

impl SegmentTable {
    /// Over a table mapped for writing.
    #[must_use]
    pub fn new(map: TableMap) -> Self {
        Self { map }
    }

    fn pages_of(&self, slot: SlotId) -> u32 {
        let chunk = self.map.layout().geometry.chunk_of(slot);
        match chunk.and_then(|chunk| self.map.chunk(chunk)) {
            Some(ChunkWord::Assigned(pages) | ChunkWord::Draining(pages)) => pages,
            _ => 0,
        }
    }
}

impl SlotTable for SegmentTable {
    fn grant(&mut self, slot: SlotId, identity: &BlockIdentity) -> SlotWord {
        self.map.record(slot).map_or(SlotWord::new(0, SlotState::Free), |record| record.grant(identity))
    }

    fn commit(&mut self, slot: SlotId, sums: &[PartSum]) -> SlotWord {
        self.map.set_part_sums(slot, self.pages_of(slot), sums);
        self.map.record(slot).map_or(SlotWord::new(0, SlotState::Free), |record| record.commit())
    }

    fn evict(&mut self, slot: SlotId) {
        if let Some(record) = self.map.record(slot) {
            record.evict();
        }
    }

    fn touch(&mut self, slot: SlotId, touched: u32) {
        if let Some(record) = self.map.record(slot) {
            record.touch(touched);
        }
    }

    fn word(&self, slot: SlotId) -> SlotWord {
        self.map.record(slot).map_or(SlotWord::new(0, SlotState::Free), |record| record.word())
    }

    fn set_chunk(&mut self, chunk: ChunkId, state: ChunkState) {
        self.map.set_chunk(
            chunk,
            match state {
                ChunkState::Cold => ChunkWord::Cold,
                ChunkState::Free => ChunkWord::Free,
                ChunkState::Assigned { pages } => ChunkWord::Assigned(pages),
                ChunkState::Draining { pages } => ChunkWord::Draining(pages),
            },
        );
    }
}
