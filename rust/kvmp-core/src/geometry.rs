//! Sizes and offsets of a segment: `header | chunk words | chunk records | chunks`.
//!
//! Behind a chunk's records lie 16 bytes a part. A slot of `pages` 4 KiB pages has room for `pages`
//! parts there, so the records and parts of a chunk never take more than 80 bytes a page.

use crate::ids::{ChunkId, SlotId};

/// Unit of slot sizes and slot numbers, bytes.
pub const PAGE: u64 = 4096;
/// Smallest chunk, bytes.
pub const MIN_CHUNK: u64 = 2 << 20;
/// Largest chunk, bytes.
pub const MAX_CHUNK: u64 = 1 << 30;
/// Bytes of a slot record.
pub const RECORD: u64 = 64;
/// Bytes of a part's sum in the table of parts.
pub const PART_SUM: u64 = 16;

/// Why a geometry cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The chunk size is no power of two between 2 MiB and 1 GiB.
    #[error("--chunk: {0} bytes are no power of two from 2MiB to 1GiB")]
    Chunk(u64),
    /// Not even one chunk fits.
    #[error(
        "--size: {arena} bytes hold no chunk of {chunk} bytes; take a larger --size (2MiB at least) or a smaller --chunk"
    )]
    NoChunk {
        /// Bytes asked for.
        arena: u64,
        /// Bytes of a chunk.
        chunk: u64,
    },
    /// Slot numbers are 32 bits of 4 KiB pages.
    #[error("--size: {0} bytes are over the 16TiB that slot numbers reach")]
    TooLarge(u64),
}

/// Geometry of one segment file; fixed for the life of its inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of one chunk, a power of two.
    pub chunk_bytes: u64,
    /// Number of chunks.
    pub chunks: u32,
}

impl Geometry {
    /// 1/64 of the arena rounded down to a power of two, 2 MiB to 1 GiB.
    #[must_use]
    pub fn default_chunk(arena_bytes: u64) -> u64 {
        let part = (arena_bytes / 64).clamp(MIN_CHUNK, MAX_CHUNK);
        1 << part.ilog2()
    }

    /// Geometry of an arena of at most `arena_bytes`.
    pub fn new(arena_bytes: u64, chunk_bytes: Option<u64>) -> Result<Self, GeometryError> {
        let chunk = chunk_bytes.unwrap_or_else(|| Self::default_chunk(arena_bytes));
        if !chunk.is_power_of_two() || !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk) {
            return Err(GeometryError::Chunk(chunk));
        }
        if arena_bytes / PAGE >= u64::from(u32::MAX) {
            return Err(GeometryError::TooLarge(arena_bytes));
        }
        match arena_bytes / chunk {
            0 => Err(GeometryError::NoChunk { arena: arena_bytes, chunk }),
            chunks => Ok(Self { chunk_bytes: chunk, chunks: chunks as u32 }),
        }
    }

    /// Bytes of all chunks.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.chunk_bytes * u64::from(self.chunks)
    }

    /// 4 KiB pages in a chunk: also how many slot numbers a chunk has.
    #[must_use]
    pub fn chunk_pages(&self) -> u32 {
        (self.chunk_bytes / PAGE) as u32
    }

    /// Bytes of a chunk's records and parts in the slot table.
    #[must_use]
    pub fn chunk_table_bytes(&self) -> u64 {
        u64::from(self.chunk_pages()) * (RECORD + PART_SUM)
    }

    /// Chunk that a slot number lies in, if there is one.
    #[must_use]
    pub fn chunk_of(&self, slot: SlotId) -> Option<ChunkId> {
        let chunk = slot.0 / self.chunk_pages();
        (chunk < self.chunks).then_some(ChunkId(chunk))
    }

    /// Index of a slot in its chunk.
    #[must_use]
    pub fn index_of(&self, slot: SlotId) -> u32 {
        slot.0 % self.chunk_pages()
    }

    /// Slot number of `index` in `chunk`.
    #[must_use]
    pub fn slot(&self, chunk: ChunkId, index: u32) -> SlotId {
        SlotId(chunk.0 * self.chunk_pages() + index)
    }

    /// How many slots of `pages` pages a chunk holds.
    #[must_use]
    pub fn slots_per_chunk(&self, pages: u32) -> u32 {
        self.chunk_pages().checked_div(pages).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_chunk_is_a_power_of_two_within_bounds() {
        assert_eq!(Geometry::default_chunk(1 << 20), MIN_CHUNK);
        assert_eq!(Geometry::default_chunk(4 << 30), 64 << 20);
        assert_eq!(Geometry::default_chunk(5 << 30), 64 << 20);
        assert_eq!(Geometry::default_chunk(1 << 40), MAX_CHUNK);
    }

    #[test]
    fn slot_numbers_round_trip() {
        let g = Geometry::new(64 << 20, Some(4 << 20)).unwrap();
        assert_eq!((g.chunks, g.chunk_pages()), (16, 1024));
        let slot = g.slot(ChunkId(15), 1023);
        assert_eq!((g.chunk_of(slot), g.index_of(slot)), (Some(ChunkId(15)), 1023));
        assert_eq!(g.chunk_of(SlotId(16 * 1024)), None);
        assert_eq!(g.chunk_of(SlotId::NONE), None);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_eq!(Geometry::new(1 << 30, Some(3 << 20)), Err(GeometryError::Chunk(3 << 20)));
        assert!(matches!(Geometry::new(1 << 20, None), Err(GeometryError::NoChunk { .. })));
        assert!(matches!(Geometry::new(1 << 45, None), Err(GeometryError::TooLarge(_))));
    }
}
