//! Recovery: index, chains and order rebuilt from the records of a file that outlived its server.
//!
//! `recover_begin`, `recover_chunk` for each assigned chunk, then `recover_finish`. Kept is what is Ready, whole, of a known
//! namespace, and has its whole chain before it. What was Writing is Quarantined until
//! `quarantine_release`: a writer of the last server epoch may still be storing into it.

use std::hint::black_box;

use crate::clock::Ticks;
use crate::ids::{ChunkId, NamespaceId, SlotId};
use crate::memory::with_memory;
use crate::namespace::GroupRule;
use crate::slot::{BlockIdentity, SlotState, SlotWord};

use super::BlockStore;
use super::answers::StoreError;
use super::blocks::{Block, BlockState};
use super::index::hash;
use super::radix::{Keyed, group, sort};
use super::table::{ChunkState, SlotTable};

/// A record found in an assigned chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FoundRecord {
    /// Its slot.
    pub slot: SlotId,
    /// Its word. Free ones need not be given.
    pub word: SlotWord,
    /// Its fields; `None` if the check does not hold.
    pub identity: Option<BlockIdentity>,
    /// Time of the last use as stored.
    pub touched: u32,
}

/// What a recovery came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// Blocks kept.
    pub kept: u64,
    /// Ready records evicted: not whole, of an unknown namespace, twice there, or without their chain.
    pub evicted: u64,
    /// Slots held until `quarantine_release`.
    pub quarantined: u64,
}

/// Blocks found by `recover_chunk`, until `recover_finish`.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    /// Ready blocks, by slot; the key is the time of the last use and, below it, the position from the tail.
    ready: Vec<Keyed>,
    /// The same, with the hash of their identity.
    hashes: Vec<Keyed>,
    spare: Vec<Keyed>,
    report: Recovered,
}

/// Places of an index that the processor's own cache holds.
const CACHED_PLACES: usize = 1 << 17;
/// Blocks whose parents are looked for at a time.
const AHEAD: usize = 64;

impl<T: SlotTable> BlockStore<T> {
    /// Makes room for `blocks` blocks at once; only saves time.
    pub fn recover_begin(&mut self, blocks: u64) {
        let blocks = usize::try_from(blocks).unwrap_or(0);
        self.index.reserve(&self.blocks.hot, blocks);
        (self.recovery.ready, self.recovery.hashes) = (with_memory(blocks), with_memory(blocks));
    }

    /// Takes over a Cold chunk that had slots of `pages` pages, with the records found in it, of each slot one at most.
    /// The namespaces must be known by now.
    pub fn recover_chunk(
        &mut self,
        chunk: ChunkId,
        pages: u32,
        found: impl IntoIterator<Item = FoundRecord>,
    ) -> Result<(), StoreError> {
        let geometry = self.config.geometry;
        let state = self.chunks.all.get(chunk.0 as usize).map(|entry| entry.state);
        if state != Some(ChunkState::Cold) || pages == 0 || geometry.slots_per_chunk(pages) == 0 {
            return Err(StoreError::Recover { chunk: chunk.0, pages, geometry });
        }
        self.chunks.cold -= 1;
        let class = self.class_of(pages);
        self.assign(chunk, class);
        let (first, slots) = (geometry.slot(chunk, 0).0, self.blocks.hot.slots_of(chunk));
        let own = |record: &FoundRecord| record.slot.0.checked_sub(first).is_some_and(|index| index < slots);
        let before = self.recovery.ready.len() + self.held.len();
        // Not a loop: the iterator's own runs without moving each record through an `Option`.
        found.into_iter().filter(own).for_each(|record| self.recover_record(class, &record));
        let used = self.recovery.ready.len() + self.held.len() - before;
        debug_assert!(used <= slots as usize, "a slot was found twice");
        self.free_the_rest(chunk, used as u32);
        Ok(())
    }

    #[inline]
    fn recover_record(&mut self, class: usize, record: &FoundRecord) {
        match record.word.state() {
            Ok(SlotState::Free) => {}
            Ok(SlotState::Ready) => match &record.identity {
                Some(identity) if self.recoverable(class, identity) => self.recover_ready(identity, record),
                _ => self.refuse_record(record.slot),
            },
            // A word of no known state may be anything: nobody writes there until the old writers are gone.
            Ok(SlotState::Writing) | Err(_) => self.recover_writing(record),
        }
    }

    #[inline]
    fn recoverable(&self, class: usize, identity: &BlockIdentity) -> bool {
        self.namespace_group(identity.namespace, identity.group).is_ok_and(|group| {
            let linked = group.rule == GroupRule::Prefix && identity.position > 0;
            group.class == class && linked == identity.parent.is_some()
        })
    }

    fn refuse_record(&mut self, slot: SlotId) {
        self.recovery.report.evicted += 1;
        self.table.evict(slot);
    }

    #[inline]
    fn recover_ready(&mut self, identity: &BlockIdentity, record: &FoundRecord) {
        let slot = record.slot;
        self.describe(slot, identity, record.word, BlockState::Ready);
        self.count_in(identity.namespace, BlockState::Ready);
        let order = u64::from(record.touched) << 32 | u64::from(!identity.position);
        self.recovery.ready.push(Keyed { key: order, slot });
        self.recovery.hashes.push(Keyed { key: hash(identity.namespace, identity.group, &identity.key), slot });
    }

    fn recover_writing(&mut self, record: &FoundRecord) {
        // Its fields may be torn: it counts for no namespace.
        let block = &mut self.blocks.hot[record.slot];
        (block.word, block.state) = (record.word, BlockState::Quarantined);
        block.namespace = NamespaceId(u16::MAX);
        self.blocks_by_state.quarantined += 1;
        self.recovery.report.quarantined += 1;
        self.held.push(record.slot);
    }

    /// Makes the chunk's list of Free slots and its counts; `used` are not Free.
    fn free_the_rest(&mut self, chunk: ChunkId, used: u32) {
        let (slots, mut free) = (self.blocks.hot.slots_of(chunk), SlotId::NONE);
        // In a full chunk there is nothing to look for.
        if used < slots {
            for slot in self.blocks.hot.slots_in(chunk).rev() {
                if self.blocks.hot[slot].state == BlockState::Free {
                    self.blocks.links[slot].next = free;
                    free = slot;
                }
            }
        }
        let entry = self.chunks.get(chunk);
        (entry.used, entry.free, entry.fresh) = (used, free, slots);
    }

    /// Makes the index, links the chains, evicts what has none, and puts the rest in the order of its last use.
    pub fn recover_finish(&mut self) -> Recovered {
        let Recovery { mut ready, mut hashes, mut spare, mut report } = std::mem::take(&mut self.recovery);
        let gone = self.index_all(&mut hashes, &mut spare) + self.adopt_all(&ready);
        if gone > 0 {
            ready.retain(|found| self.blocks.hot[found.slot].state == BlockState::Ready);
        }
        (report.kept, report.evicted) = (ready.len() as u64, report.evicted + gone);
        sort(&mut ready, &mut hashes);
        self.order(&ready);
        self.counters.recovered_blocks += report.kept;
        report
    }

    /// Puts blocks in the index. Of two blocks with one identity the second goes; returns how many went.
    fn index_all(&mut self, hashes: &mut Vec<Keyed>, spare: &mut Vec<Keyed>) -> u64 {
        let places = self.index.places();
        if places > CACHED_PLACES {
            // In about the order of their places: one at random after the other, each would be a cache miss.
            group(hashes, spare, places.ilog2());
        }
        let mut twice = 0;
        for &Keyed { key: hash, slot } in hashes.iter() {
            if !self.index.insert_new(&self.blocks.hot, slot, hash) {
                twice += 1;
                self.evict_unindexed(slot);
            }
        }
        twice
    }

    /// Hangs every block on its parent, and evicts what then hangs on no head; returns how many went.
    fn adopt_all(&mut self, ready: &[Keyed]) -> u64 {
        let mut loose = Vec::new();
        for slots in ready.chunks(AHEAD) {
            if self.index.places() > CACHED_PLACES {
                // Parents may lie anywhere: these loads wait for no other, so their cache misses overlap.
                let parents = slots.iter().map(|found| self.blocks.hot[found.slot].parent);
                black_box(parents.filter_map(|parent| self.blocks.hot.get(parent)).map(|parent| parent.position).max());
            }
            loose.extend(slots.iter().map(|found| found.slot).filter(|slot| !self.adopt(*slot)));
        }
        loose.into_iter().map(|root| self.evict_orphans(root)).sum()
    }

    /// Hangs a block on its parent; false if that is not there. Positions fall by one towards the head, so what hangs on
    /// no loose block hangs, over any number of parents, on a head.
    fn adopt(&mut self, slot: SlotId) -> bool {
        let Block { parent, position, namespace, group, .. } = self.blocks.hot[slot];
        if !parent.is_some() {
            return true;
        }
        let there = self.blocks.hot.get(parent).is_some_and(|parent| {
            parent.state == BlockState::Ready
                && position.checked_sub(1) == Some(parent.position)
                && (parent.namespace, parent.group) == (namespace, group)
        });
        if there {
            self.blocks.hang(slot, parent);
        }
        there
    }

    /// Evicts a block that hangs on nothing and all that hangs on it, deepest first; no policy knows them. Returns how many.
    fn evict_orphans(&mut self, root: SlotId) -> u64 {
        let (mut at, mut count) = (root, 0);
        loop {
            let leaf = self.blocks.first_leaf(at);
            at = self.blocks.hot[leaf].parent;
            count += 1;
            if leaf == root {
                self.evict_orphan(leaf);
                return count;
            }
            self.blocks.detach(leaf);
            self.evict_orphan(leaf);
        }
    }

    fn evict_orphan(&mut self, slot: SlotId) {
        self.index.remove(&self.blocks.hot, slot);
        self.evict_unindexed(slot);
    }

    fn evict_unindexed(&mut self, slot: SlotId) {
        self.blocks_by_state.ready -= 1;
        self.table.evict(slot);
        self.forget(slot);
    }

    fn order(&mut self, ready: &[Keyed]) {
        for &Keyed { key, slot } in ready {
            let now = Ticks(key >> 32);
            let class = self.class_at(slot);
            self.classes[class].policy.insert(slot, now);
            self.heat(slot, now);
        }
    }

    /// Every writer of the last server epoch is gone: the slots held for them become Free.
    pub fn quarantine_release(&mut self) -> u64 {
        let held = std::mem::take(&mut self.held);
        let count = held.len() as u64;
        held.into_iter().for_each(|slot| self.end_quarantine(slot));
        self.wake_drain();
        count
    }
}
