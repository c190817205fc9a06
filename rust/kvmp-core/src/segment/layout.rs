//! Offsets of everything in the file.

use crate::geometry::{Geometry, PAGE, PART_SUM, RECORD};
use crate::ids::{ChunkId, SlotId};

/// Bytes of the header page.
const HEADER_PAGE: u64 = PAGE;
/// Offset of the data-plane thread's parked word.
pub const PARKED_OFFSET: u64 = 128;
/// Offset of the bits that say which namespace entries are used.
#[cfg(not(loom))]
pub(super) const NAMESPACES_USED: u64 = 512;
/// Number of holder entries.
pub const HOLDERS: u32 = 4096;
/// Bytes of a holder entry: pid and role as u64s, the rest unused.
pub const HOLDER_ENTRY: u64 = 64;
/// Number of entries of the namespace table.
pub const NAMESPACES: u32 = 4096;
/// Entries of it that have memory from the start.
const NAMESPACES_BACKED: u64 = 16;
/// Bytes of an entry of the namespace table.
pub const NAMESPACE_ENTRY: u64 = 16 << 10;
/// Bytes in front of the spec in a namespace entry: digest, state, length.
pub(super) const NAMESPACE_FRONT: u64 = 64;
/// Longest spec, as canonical JSON, in bytes.
pub const MAX_SPEC_BYTES: usize = (NAMESPACE_ENTRY - NAMESPACE_FRONT) as usize;
const NAMESPACE_TABLE: u64 = 512 << 10;
const CHUNK_WORDS: u64 = NAMESPACE_TABLE + NAMESPACES as u64 * NAMESPACE_ENTRY;
/// Chunks begin at a multiple of this, so that hugetlbfs can hold the file.
const HUGE_PAGE: u64 = 2 << 20;

/// Offset of a holder entry; also the byte that its holder keeps locked.
#[must_use]
pub fn holder_offset(index: u32) -> u64 {
    HEADER_PAGE + u64::from(index) * HOLDER_ENTRY
}

/// Offsets that depend on the geometry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Sizes they were computed from.
    pub geometry: Geometry,
    records: u64,
    chunks: u64,
}

impl Layout {
    /// Offsets for a geometry.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        let records = (CHUNK_WORDS + u64::from(geometry.chunks) * 8).next_multiple_of(PAGE);
        let table_end = records + u64::from(geometry.chunks) * geometry.chunk_table_bytes();
        Self { geometry, records, chunks: table_end.next_multiple_of(HUGE_PAGE) }
    }

    /// Bytes from the file's start that hold header, words and records: what clients map read-only.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        self.chunks
    }

    /// Offset of the first chunk.
    #[must_use]
    pub fn arena_offset(&self) -> u64 {
        self.chunks
    }

    /// Length of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.chunks + self.geometry.arena_bytes()
    }

    /// Ranges that must have memory before the server writes its first byte: header page, holder entries, the first
    /// namespaces (a file system that fills up later must not keep a model out), chunk words.
    #[must_use]
    pub fn always_backed(&self) -> [(u64, u64); 3] {
        [
            (0, holder_offset(HOLDERS)),
            (NAMESPACE_TABLE, NAMESPACES_BACKED * NAMESPACE_ENTRY),
            (CHUNK_WORDS, u64::from(self.geometry.chunks) * 8),
        ]
    }

    /// Range of a namespace entry.
    #[must_use]
    pub fn namespace_entry(&self, index: u32) -> (u64, u64) {
        (NAMESPACE_TABLE + u64::from(index) * NAMESPACE_ENTRY, NAMESPACE_ENTRY)
    }

    /// Offset of a chunk's word.
    #[must_use]
    pub fn chunk_word(&self, chunk: ChunkId) -> u64 {
        CHUNK_WORDS + u64::from(chunk.0) * 8
    }

    /// Range of a chunk's records and parts in the file.
    #[must_use]
    pub fn chunk_table(&self, chunk: ChunkId) -> (u64, u64) {
        let bytes = self.geometry.chunk_table_bytes();
        (self.records + u64::from(chunk.0) * bytes, bytes)
    }

    /// Range of a chunk's bytes in the file.
    #[must_use]
    pub fn chunk(&self, chunk: ChunkId) -> (u64, u64) {
        (self.chunks + u64::from(chunk.0) * self.geometry.chunk_bytes, self.geometry.chunk_bytes)
    }

    /// Offset of a slot's record, if there is such a slot.
    #[must_use]
    pub fn record(&self, slot: SlotId) -> Option<u64> {
        let chunk = self.geometry.chunk_of(slot)?;
        Some(self.chunk_table(chunk).0 + u64::from(self.geometry.index_of(slot)) * RECORD)
    }

    /// Offset of the sums of a slot of `pages` pages; room for `pages` parts.
    #[must_use]
    pub fn part_sums(&self, slot: SlotId, pages: u32) -> Option<u64> {
        let chunk = self.geometry.chunk_of(slot)?;
        let sums = self.chunk_table(chunk).0 + u64::from(self.geometry.chunk_pages()) * RECORD;
        let first = u64::from(self.geometry.index_of(slot)) * u64::from(pages);
        (first + u64::from(pages) <= u64::from(self.geometry.chunk_pages())).then_some(sums + first * PART_SUM)
    }

    /// Offset in the arena (from the first chunk's first byte) of a slot of `pages` pages.
    #[must_use]
    pub fn slot_in_arena(&self, slot: SlotId, pages: u32) -> Option<u64> {
        let chunk = self.geometry.chunk_of(slot)?;
        let index = self.geometry.index_of(slot);
        (index < self.geometry.slots_per_chunk(pages))
            .then(|| u64::from(chunk.0) * self.geometry.chunk_bytes + u64::from(index) * u64::from(pages) * PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap() {
        let layout = Layout::new(Geometry::new(256 << 20, Some(4 << 20)).unwrap());
        let last = ChunkId(layout.geometry.chunks - 1);
        assert!(holder_offset(HOLDERS) <= NAMESPACE_TABLE);
        let (at, len) = layout.namespace_entry(NAMESPACES - 1);
        assert!(at + len <= layout.chunk_word(ChunkId(0)));
        assert!(layout.chunk_word(last) + 8 <= layout.chunk_table(ChunkId(0)).0);
        let (at, len) = layout.chunk_table(last);
        assert!(at + len <= layout.arena_offset());
        let (at, len) = layout.chunk(last);
        assert_eq!(at + len, layout.file_bytes());
    }

    #[test]
    fn sums_of_a_chunk_stay_in_its_table() {
        let layout = Layout::new(Geometry::new(16 << 20, Some(2 << 20)).unwrap());
        for pages in [1, 3, 7, 512] {
            let n = layout.geometry.slots_per_chunk(pages);
            let slot = layout.geometry.slot(ChunkId(1), n - 1);
            let (table, bytes) = layout.chunk_table(ChunkId(1));
            let sums = layout.part_sums(slot, pages).unwrap();
            assert!(sums >= table + u64::from(layout.geometry.chunk_pages()) * RECORD);
            assert!(sums + u64::from(pages) * PART_SUM <= table + bytes);
            let beyond = layout.slot_in_arena(layout.geometry.slot(ChunkId(1), n), pages);
            assert!(beyond.is_none() || n == layout.geometry.chunk_pages());
        }
    }
}
