//! The 64 bytes of a slot record and the order in which they change.
//!
//! Written by the server only. Order, with a Release fence between the steps, so that a SIGKILL at any
//! instruction leaves each record whole or not Ready:
//! grant: word = Writing(g+1), fields. commit: check, word = Ready. evict: word = Free, no check.

use xxhash_rust::xxh3::xxh3_64;

use crate::ids::{BlockKey, GroupId, NamespaceId, SlotId};
use crate::slot::{BlockIdentity, SlotState, SlotWord};
use crate::sync::{AtomicU64, Ordering, fence};

const WORD: usize = 0;
const KEY: usize = 1;
const PLACE: usize = 5;
const LINK: usize = 6;
const SEAL: usize = 7;

/// The atomics of one record.
pub struct RecordCells<'a>(pub &'a [AtomicU64; 8]);

/// A record as read at recovery.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// The slot word.
    pub word: SlotWord,
    /// Whose block it is.
    pub identity: BlockIdentity,
    /// Last hit or commit, in 1/16 s since the file was made.
    pub touched: u32,
    /// Whether `check` fits the rest.
    pub whole: bool,
}

impl RecordCells<'_> {
    /// The slot word now.
    #[must_use]
    pub fn word(&self) -> SlotWord {
        SlotWord(self.0[WORD].load(Ordering::Acquire))
    }

    fn set_word(&self, word: SlotWord) {
        // Pairs with the reader's fence(Acquire) after its copy: a reader that saw bytes of a later grant sees its word.
        self.0[WORD].store(word.0, Ordering::Release);
        fence(Ordering::Release);
    }

    /// Free (or any state) -> Writing(generation + 1), then the fields.
    pub fn grant(&self, identity: &BlockIdentity) -> SlotWord {
        let word = SlotWord::new(self.word().generation() + 1, SlotState::Writing);
        self.set_word(word);
        for (i, bytes) in identity.key.0.as_chunks::<8>().0.iter().enumerate() {
            self.0[KEY + i].store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        let place =
            u64::from(identity.namespace.0) | u64::from(identity.group.0) << 16 | u64::from(identity.position) << 32;
        self.0[PLACE].store(place, Ordering::Relaxed);
        self.0[LINK].store(u64::from(identity.parent.0), Ordering::Relaxed);
        self.0[SEAL].store(u64::from(identity.bytes), Ordering::Relaxed);
        fence(Ordering::Release);
        word
    }

    /// Writing -> Ready: the check first, then the word.
    pub fn commit(&self) -> SlotWord {
        let word = self.word().with_state(SlotState::Ready);
        let cells = self.cells();
        let seal = cells[SEAL] & 0xffff_ffff;
        self.0[SEAL].store(seal | u64::from(checksum(word, &cells)) << 32, Ordering::Relaxed);
        fence(Ordering::Release);
        self.set_word(word);
        word
    }

    /// -> Free, generation kept. Then the check goes: a bit that flips must not make a block of it again, whose bytes
    /// another slot size may have written over.
    pub fn evict(&self) {
        self.set_word(self.word().with_state(SlotState::Free));
        self.0[SEAL].store(self.get(SEAL) & 0xffff_ffff, Ordering::Relaxed);
    }

    /// Notes a hit.
    pub fn touch(&self, touched: u32) {
        let link = self.0[LINK].load(Ordering::Relaxed) & 0xffff_ffff;
        self.0[LINK].store(link | u64::from(touched) << 32, Ordering::Relaxed);
    }

    /// The whole record, for recovery.
    #[must_use]
    #[inline]
    pub fn read(&self) -> Record {
        let word = self.word();
        let cells = self.cells();
        let (place, link, seal) = (cells[PLACE], cells[LINK], cells[SEAL]);
        Record {
            word,
            identity: BlockIdentity {
                key: key(&cells),
                namespace: NamespaceId(place as u16),
                group: GroupId((place >> 16) as u16),
                position: (place >> 32) as u32,
                parent: SlotId(link as u32),
                bytes: seal as u32,
            },
            touched: (link >> 32) as u32,
            whole: (seal >> 32) as u32 == checksum(word, &cells),
        }
    }

    fn get(&self, cell: usize) -> u64 {
        self.0[cell].load(Ordering::Relaxed)
    }

    #[inline]
    fn cells(&self) -> [u64; 8] {
        std::array::from_fn(|cell| self.get(cell))
    }
}

fn key(cells: &[u64; 8]) -> BlockKey {
    let mut key = [0; 32];
    for (cell, out) in cells[KEY..PLACE].iter().zip(key.as_chunks_mut::<8>().0) {
        *out = cell.to_le_bytes();
    }
    BlockKey(key)
}

/// Low half of xxh3 over the record without state and `touched`.
#[inline]
fn checksum(word: SlotWord, cells: &[u64; 8]) -> u32 {
    let mut rest = *cells;
    rest[WORD] = word.generation();
    rest[LINK] &= 0xffff_ffff;
    rest[SEAL] &= 0xffff_ffff;
    xxh3_64(rest.map(u64::to_le_bytes).as_flattened()) as u32
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn identity() -> BlockIdentity {
        BlockIdentity {
            key: BlockKey(std::array::from_fn(|i| i as u8)),
            namespace: NamespaceId(3),
            group: GroupId(1),
            position: 77,
            parent: SlotId(12),
            bytes: 4000,
        }
    }

    #[test]
    fn a_block_lives_and_its_word_never_returns() {
        let cells: [AtomicU64; 8] = Default::default();
        let record = RecordCells(&cells);
        let granted = record.grant(&identity());
        assert_eq!(granted, SlotWord::new(1, SlotState::Writing));
        assert!(!record.read().whole);
        record.touch(9);
        let ready = record.commit();
        let read = record.read();
        assert_eq!((read.word, read.identity, read.touched, read.whole), (ready, identity(), 9, true));
        record.touch(u32::MAX);
        assert!(record.read().whole);
        record.evict();
        assert_eq!(record.word(), SlotWord::new(1, SlotState::Free));
        assert!(!record.read().whole, "nothing is left to come back");
        record.grant(&identity());
        assert_ne!(record.commit(), ready);
    }

    #[test]
    fn a_flipped_bit_is_seen() {
        for cell in 0..8 {
            for bit in 0..64 {
                let touched_or_state = (cell == LINK && bit >= 32) || (cell == WORD && bit < 16);
                let cells: [AtomicU64; 8] = Default::default();
                let record = RecordCells(&cells);
                record.grant(&identity());
                record.commit();
                cells[cell].fetch_xor(1 << bit, Ordering::Relaxed);
                assert_eq!(record.read().whole, touched_or_state, "cell {cell} bit {bit}");
            }
        }
    }
}
