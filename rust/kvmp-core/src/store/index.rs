//! From (namespace, group, key) to slot; full keys are compared.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::ids::{BlockKey, GroupId, NamespaceId, SlotId};
use crate::per_slot::PerSlot;

use super::blocks::Block;

/// Slots of Ready and Writing blocks; their keys lie in [`Block`].
#[derive(Debug, Default)]
pub(super) struct Index {
    table: HashTable<u32>,
}

fn word(bytes: &[u8; 32], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

/// Product of two words, folded: every bit of both reaches every bit of the hash.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

/// Hash of a block's identity. All of the key goes in: short keys are zero-padded, and a careless
/// client's keys may differ anywhere.
#[inline]
pub(super) fn hash(namespace: NamespaceId, group: GroupId, key: &BlockKey) -> u64 {
    let whose = (u64::from(namespace.0) << 16) | u64::from(group.0);
    let low = fold(word(&key.0, 0) ^ 0x9e37_79b9_7f4a_7c15, word(&key.0, 8) ^ whose ^ 0xbf58_476d_1ce4_e5b9);
    let high = fold(word(&key.0, 16) ^ 0x94d0_49bb_1331_11eb, word(&key.0, 24) ^ 0xd6e8_feb8_6659_fd93);
    fold(low ^ 0xa076_1d64_78bd_642f, high ^ 0xe703_7ed1_a0b4_28db)
}

impl Index {
    #[inline]
    pub fn find(
        &self,
        blocks: &PerSlot<Block>,
        hash: u64,
        namespace: NamespaceId,
        group: GroupId,
        key: &BlockKey,
    ) -> Option<SlotId> {
        let same = |slot: &u32| {
            let block = &blocks[SlotId(*slot)];
            block.key == *key && block.namespace == namespace && block.group == group
        };
        self.table.find(hash, same).map(|slot| SlotId(*slot))
    }

    /// The first slot whose tag agrees, its key not compared: wrong for about one key in a hundred.
    /// It reads the table only, so that a slice's misses of table and of blocks overlap.
    #[inline]
    pub fn guess(&self, hash: u64) -> SlotId {
        self.table.iter_hash(hash).next().map_or(SlotId::NONE, |slot| SlotId(*slot))
    }

    /// Room for `more` blocks, so that grants do not meet a rehash one by one.
    pub fn reserve(&mut self, blocks: &PerSlot<Block>, more: usize) {
        self.table.reserve(more, |slot| hash_of(blocks, *slot));
    }

    pub fn insert(&mut self, blocks: &PerSlot<Block>, slot: SlotId) {
        let hash = hash_of(blocks, slot.0);
        self.table.insert_unique(hash, slot.0, |slot| hash_of(blocks, *slot));
    }

    /// Inserts a block with this hash unless another has its identity; returns whether it did.
    #[inline]
    pub fn insert_new(&mut self, blocks: &PerSlot<Block>, slot: SlotId, hash: u64) -> bool {
        // The block is loaded only where a tag agrees: recovery inserts in the order of hashes, which is none of slots.
        let same = |other: &u32| {
            let (new, other) = (&blocks[slot], &blocks[SlotId(*other)]);
            other.key == new.key && other.namespace == new.namespace && other.group == new.group
        };
        match self.table.entry(hash, same, |slot| hash_of(blocks, *slot)) {
            Entry::Occupied(_) => false,
            Entry::Vacant(place) => {
                place.insert(slot.0);
                true
            }
        }
    }

    pub fn remove(&mut self, blocks: &PerSlot<Block>, slot: SlotId) {
        if let Ok(entry) = self.table.find_entry(hash_of(blocks, slot.0), |other| *other == slot.0) {
            entry.remove();
        }
    }

    /// Places for blocks, a power of two; which one a block gets is in the low bits of its hash.
    pub fn places(&self) -> usize {
        self.table.num_buckets()
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }
}

fn hash_of(blocks: &PerSlot<Block>, slot: u32) -> u64 {
    let block = &blocks[SlotId(slot)];
    hash(block.namespace, block.group, &block.key)
}
