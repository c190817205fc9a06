//! Header, chunk words, records and namespace table of a mapped segment.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, IntoBytes};

use super::header::SegmentHeader;
use super::layout::{
    Layout, MAX_SPEC_BYTES, NAMESPACE_FRONT, NAMESPACES, NAMESPACES_USED, PARKED_OFFSET, holder_offset,
};
use super::mapping::Mapping;
use super::record::RecordCells;
use crate::geometry::RECORD;
use crate::ids::{ChunkId, NamespaceId, PartId, SlotId};
use crate::slot::PartSum;
use crate::slot::SlotState::{Free, Ready};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// What a chunk's word says: which pages a slot of it has, and whether its memory is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChunkWord {
    /// No memory yet.
    Cold,
    /// Backed, of no slot size.
    Free,
    /// Holds slots of so many 4 KiB pages.
    Assigned(u32),
    /// Holds slots of so many pages and is being emptied.
    Draining(u32),
}

impl ChunkWord {
    /// `kind 8, seal 24, pages 32`; all zero is Cold, as a new file has it.
    fn to_u64(self, chunk: ChunkId) -> u64 {
        let (kind, pages) = match self {
            Self::Cold => return 0,
            Self::Free => (1, 0),
            Self::Assigned(pages) => (2, pages),
            Self::Draining(pages) => (3, pages),
        };
        u64::from(pages) << 32 | seal(chunk, kind, pages) << 8 | kind
    }

    fn from_u64(raw: u64, chunk: ChunkId) -> Option<Self> {
        let pages = (raw >> 32) as u32;
        let word = match raw as u8 {
            0 => Self::Cold,
            1 => Self::Free,
            2 => Self::Assigned(pages),
            3 => Self::Draining(pages),
            _ => return None,
        };
        (word.to_u64(chunk) == raw).then_some(word)
    }
}

/// 24 bits that a word is not likely to have which the server did not write: taken for another chunk's, or another size's,
/// its records would name blocks that lie elsewhere.
fn seal(chunk: ChunkId, kind: u64, pages: u32) -> u64 {
    let said = [u64::from(chunk.0), kind | u64::from(pages) << 32];
    xxh3_64(said.as_bytes()) >> 40
}

/// An entry of the namespace table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamespaceEntry {
    /// Digest of the spec.
    pub digest: [u8; 32],
    /// The spec as canonical JSON.
    pub spec: String,
}

impl NamespaceEntry {
    /// How many bytes of its place an entry takes, by its front; `None` if that makes no sense.
    fn bytes(front: &[u8]) -> Option<usize> {
        let (front, _) = NamespaceFront::read_from_prefix(front).ok()?;
        (front.spec_bytes <= MAX_SPEC_BYTES as u64).then(|| (NAMESPACE_FRONT + front.spec_bytes) as usize)
    }

    /// An entry from the bytes of its place; `None` where they make no sense.
    #[must_use]
    pub fn parse(place: &[u8]) -> Option<Self> {
        let (front, rest) = NamespaceFront::read_from_prefix(place).ok()?;
        let spec = rest.get(..Self::bytes(place)? - NAMESPACE_FRONT as usize)?;
        Some(Self { digest: front.digest, spec: String::from_utf8(spec.into()).ok()? })
    }
}

#[derive(FromBytes, IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct NamespaceFront {
    digest: [u8; 32],
    spec_bytes: u64,
    reserved: [u64; 3],
}

/// The front of a segment (`Layout::table_bytes`), mapped: read-write in the server, read-only in clients.
#[derive(Clone, Debug)]
pub struct TableMap {
    map: Mapping,
    layout: Layout,
}

impl TableMap {
    /// Wraps a mapping of at least `layout.table_bytes()`; panics when it is shorter.
    #[must_use]
    pub fn new(map: Mapping, layout: Layout) -> Self {
        assert!(map.len() as u64 >= layout.table_bytes(), "the table's mapping is too short");
        Self { map, layout }
    }

    /// Offsets of the file.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Lets go of the file (server only): what is read from here on is zeroes.
    pub fn sever(&self) -> std::io::Result<()> {
        self.map.sever()
    }

    /// The header as it is now.
    #[must_use]
    pub fn header(&self) -> Option<SegmentHeader> {
        let mut bytes = [0; SegmentHeader::BYTES];
        self.map.read(0, &mut bytes);
        SegmentHeader::parse(&bytes).ok()
    }

    /// Writes the header (server only).
    pub fn set_header(&self, header: &SegmentHeader) {
        self.map.write(0, header.as_bytes());
        fence(Ordering::Release);
    }

    /// Set while the data-plane thread sleeps or is about to.
    #[must_use]
    pub fn parked(&self) -> &AtomicU32 {
        self.map.u32_at(PARKED_OFFSET)
    }

    /// The record of a slot, if there is such a slot.
    #[must_use]
    pub fn record(&self, slot: SlotId) -> Option<RecordCells<'_>> {
        Some(RecordCells(self.map.u64s_at(self.layout.record(slot)?)))
    }

    /// The first `count` records of a chunk, by the index of their slot.
    pub fn records(&self, chunk: ChunkId, count: u32) -> impl Iterator<Item = RecordCells<'_>> {
        let (first, _) = self.layout.chunk_table(chunk);
        (0..u64::from(count)).map(move |index| RecordCells(self.map.u64s_at(first + index * RECORD)))
    }

    /// A chunk's word; `None` when it holds nothing that a server wrote.
    #[must_use]
    pub fn chunk(&self, chunk: ChunkId) -> Option<ChunkWord> {
        ChunkWord::from_u64(self.map.u64_at(self.layout.chunk_word(chunk)).load(Ordering::Acquire), chunk)
    }

    /// Evicts what the records of a chunk still name that has just got its memory (server only): it was Cold, so that can
    /// only be there by damage to its word. False where somebody may still be writing: then nobody may be given a slot.
    #[must_use]
    pub fn evict_strays(&self, chunk: ChunkId) -> bool {
        let records = self.records(chunk, self.layout.geometry.chunk_pages());
        let mut strays = records.filter(|record| record.word().state() != Ok(Free));
        strays.all(|record| {
            let is_ready = record.word().state() == Ok(Ready);
            if is_ready {
                record.evict();
            }
            is_ready
        })
    }

    /// Sets a chunk's word (server only).
    pub fn set_chunk(&self, chunk: ChunkId, word: ChunkWord) {
        self.map.u64_at(self.layout.chunk_word(chunk)).store(word.to_u64(chunk), Ordering::Release);
        fence(Ordering::Release);
    }

    /// Writes the sums of a slot's parts (server only); sums beyond the slot's room are dropped.
    pub fn set_part_sums(&self, slot: SlotId, pages: u32, sums: &[PartSum]) {
        if let Some(offset) = self.layout.part_sums(slot, pages) {
            let n = sums.len().min(pages as usize);
            self.map.write(offset, sums[..n].as_bytes());
        }
    }

    /// The sum of one part of a slot, as its commit brought it; `None` where there is no such slot or part now. It says
    /// something of a block only if the slot's word is the block's before and after.
    #[must_use]
    pub fn part_sum(&self, slot: SlotId, part: PartId) -> Option<PartSum> {
        let (ChunkWord::Assigned(pages) | ChunkWord::Draining(pages)) =
            self.chunk(self.layout.geometry.chunk_of(slot)?)?
        else {
            return None;
        };
        let first = self.layout.part_sums(slot, pages).filter(|_| u32::from(part.0) < pages)?;
        let mut sum = PartSum::default();
        self.map.read(first + u64::from(part.0) * size_of::<PartSum>() as u64, sum.as_mut_bytes());
        Some(sum)
    }

    /// Writes who holds a holder entry (server only).
    pub fn set_holder(&self, index: u32, pid: u64, role: u64) {
        let [p, r] = self.map.u64s_at(holder_offset(index));
        p.store(pid, Ordering::Relaxed);
        r.store(role, Ordering::Relaxed);
    }

    /// Who held a holder entry last: pid and role.
    #[must_use]
    pub fn holder(&self, index: u32) -> (u64, u64) {
        let [p, r] = self.map.u64s_at(holder_offset(index));
        (p.load(Ordering::Relaxed), r.load(Ordering::Relaxed))
    }

    /// The bit that says whether an entry is used. It lies in the header page: looking at an unused entry itself would
    /// take memory from the file system, which may have none left.
    fn namespace_bit(&self, id: NamespaceId) -> (&AtomicU64, u64) {
        let word = self.map.u64_at(NAMESPACES_USED + u64::from(id.0) / 64 * 8);
        (word, 1 << (id.0 % 64))
    }

    /// Ids of the used entries.
    #[must_use]
    pub fn namespaces(&self) -> Vec<NamespaceId> {
        (0..NAMESPACES as u16).map(NamespaceId).filter(|&id| self.is_used(id)).collect()
    }

    fn is_used(&self, id: NamespaceId) -> bool {
        let (word, bit) = self.namespace_bit(id);
        u32::from(id.0) < NAMESPACES && word.load(Ordering::Acquire) & bit != 0
    }

    /// Reads an entry of the namespace table; `None` where it is unused or makes no sense.
    #[must_use]
    pub fn namespace(&self, id: NamespaceId) -> Option<NamespaceEntry> {
        if !self.is_used(id) {
            return None;
        }
        let (at, _) = self.layout.namespace_entry(u32::from(id.0));
        let mut front = [0; NAMESPACE_FRONT as usize];
        self.map.read(at, &mut front);
        let mut bytes = vec![0; NamespaceEntry::bytes(&front)?];
        self.map.read(at, &mut bytes);
        NamespaceEntry::parse(&bytes)
    }

    /// Writes an entry of the namespace table (server only); its memory must be backed, its spec fit.
    pub fn set_namespace(&self, id: NamespaceId, entry: &NamespaceEntry) {
        let (at, _) = self.layout.namespace_entry(u32::from(id.0));
        self.clear_namespace(id);
        let front = NamespaceFront { digest: entry.digest, spec_bytes: entry.spec.len() as u64, reserved: [0; 3] };
        self.map.write(at, front.as_bytes());
        self.map.write(at + NAMESPACE_FRONT, entry.spec.as_bytes());
        fence(Ordering::Release);
        let (word, bit) = self.namespace_bit(id);
        word.fetch_or(bit, Ordering::Release);
    }

    /// Marks an entry unused (server only).
    pub fn clear_namespace(&self, id: NamespaceId) {
        let (word, bit) = self.namespace_bit(id);
        word.fetch_and(!bit, Ordering::Release);
        fence(Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_word_is_read_as_it_was_written_and_no_other() {
        let chunk = ChunkId(7);
        for word in [ChunkWord::Free, ChunkWord::Assigned(3), ChunkWord::Draining(3), ChunkWord::Assigned(262_144)] {
            let raw = word.to_u64(chunk);
            assert_eq!(ChunkWord::from_u64(raw, chunk), Some(word));
            assert_eq!(ChunkWord::from_u64(raw, ChunkId(8)), None, "another chunk's");
            for bit in 0..64 {
                assert_eq!(ChunkWord::from_u64(raw ^ 1 << bit, chunk), None, "{word:?} bit {bit}");
            }
        }
        assert_eq!(ChunkWord::from_u64(0, chunk), Some(ChunkWord::Cold));
        assert_eq!((ChunkWord::from_u64(1, chunk), ChunkWord::from_u64(2 | 3 << 32, chunk)), (None, None));
    }
}
