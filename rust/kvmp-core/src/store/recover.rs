//! Recovery: index, chains and order rebuilt from the records of a file that outlived its server.
//!
//! `recover_begin`, `recover_chunk` for each assigned chunk, then `recover_finish`. Kept is what is Ready, whole, of a known
//! namespace, and has its whole chain before it. What was Writing is Quarantined until
//! `quarantine_release`: a writer of the last server epoch may still be storing into it.

use crate::clock::Ticks;
use crate::ids::{ChunkId, NamespaceId, SlotId};
use crate::namespace::GroupRule;
use crate::slot::{BlockIdentity, SlotState, SlotWord};

use super::BlockStore;
use super::answers::StoreError;
use super::blocks::BlockState;
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

/// A Ready block found, to be ordered: coldest first, and at one time the tail first.
type Ordered = (u32, std::cmp::Reverse<u32>, SlotId);

/// Blocks found by `recover_chunk`, until `recover_finish`.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    ready: Vec<Ordered>,
    report: Recovered,
}

impl<T: SlotTable> BlockStore<T> {
    /// Makes room for `blocks` blocks at once; only saves time.
    pub fn recover_begin(&mut self, blocks: u64) {
        let blocks = usize::try_from(blocks).unwrap_or(0);
        self.index.reserve(&self.blocks.hot, blocks);
        self.recovery.ready.reserve(blocks);
    }

    /// Takes over a Cold chunk that had slots of `pages` pages, with the records found in it. The
    /// namespaces must be known by now.
    pub fn recover_chunk(&mut self, chunk: ChunkId, pages: u32, found: &[FoundRecord]) -> Result<(), StoreError> {
        let geometry = self.config.geometry;
        let state = self.chunks.all.get(chunk.0 as usize).map(|entry| entry.state);
        if state != Some(ChunkState::Cold) || pages == 0 || geometry.slots_per_chunk(pages) == 0 {
            return Err(StoreError::Recover { chunk: chunk.0, pages, geometry });
        }
        self.chunks.cold -= 1;
        let class = self.class_of(pages);
        self.assign(chunk, class);
        for record in found.iter().filter(|record| geometry.chunk_of(record.slot) == Some(chunk)) {
            self.recover_record(class, record);
        }
        self.free_the_rest(chunk);
        Ok(())
    }

    fn recover_record(&mut self, class: usize, record: &FoundRecord) {
        if !self.blocks.has(record.slot) {
            return;
        }
        match record.word.state() {
            Ok(SlotState::Free) => {}
            Ok(SlotState::Ready) => match self.recoverable(class, record) {
                Some(identity) => self.recover_ready(&identity, record),
                None => self.refuse_record(record.slot),
            },
            // A word of no known state may be anything: nobody writes there until the old writers are gone.
            Ok(SlotState::Writing) | Err(_) => self.recover_writing(record),
        }
    }

    fn recoverable(&self, class: usize, record: &FoundRecord) -> Option<BlockIdentity> {
        let identity = record.identity?;
        let group = self.namespace_group(identity.namespace, identity.group).ok()?;
        let linked = group.rule == GroupRule::Prefix && identity.position > 0;
        let fits = group.class == class && linked == identity.parent.is_some();
        fits.then_some(identity)
    }

    fn refuse_record(&mut self, slot: SlotId) {
        self.recovery.report.evicted += 1;
        self.table.evict(slot);
    }

    fn recover_ready(&mut self, identity: &BlockIdentity, record: &FoundRecord) {
        self.describe(record.slot, identity, record.word, BlockState::Ready);
        if !self.index.insert_new(&self.blocks.hot, record.slot) {
            self.blocks.reset(record.slot);
            return self.refuse_record(record.slot);
        }
        self.count_in(record.slot);
        self.recovery.ready.push((record.touched, std::cmp::Reverse(identity.position), record.slot));
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

    /// Makes the chunk's list of Free slots and its counts.
    fn free_the_rest(&mut self, chunk: ChunkId) {
        let (mut used, mut free) = (0, SlotId::NONE);
        for slot in self.blocks.hot.slots_in(chunk).collect::<Vec<_>>().into_iter().rev() {
            if self.blocks.hot[slot].state == BlockState::Free {
                self.blocks.links[slot].next = free;
                free = slot;
            } else {
                used += 1;
            }
        }
        let slots = self.blocks.hot.slots_of(chunk);
        let entry = self.chunks.get(chunk);
        (entry.used, entry.free, entry.fresh) = (used, free, slots);
    }

    /// Links the chains, evicts what has none, and puts the rest in the order of its last use.
    pub fn recover_finish(&mut self) -> Recovered {
        let recovery = std::mem::take(&mut self.recovery);
        let (mut kept, mut rest) = self.adopt_all(recovery.ready);
        // Chains were mostly granted in the order of their slots. For the others: parents first, so that
        // whoever finds its own parent adopted has its whole chain.
        rest.sort_unstable_by_key(|(_, position, slot)| (std::cmp::Reverse(*position), *slot));
        let (late, orphans) = self.adopt_all(rest);
        kept.extend(late);
        orphans.iter().for_each(|found| self.evict_orphan(found.2));
        let mut report = recovery.report;
        (report.kept, report.evicted) = (kept.len() as u64, report.evicted + orphans.len() as u64);
        self.order(kept);
        self.counters.recovered_blocks += report.kept;
        report
    }

    fn adopt_all(&mut self, found: Vec<Ordered>) -> (Vec<Ordered>, Vec<Ordered>) {
        found.into_iter().partition(|found| self.adopt(found.2))
    }

    /// Hangs a block on its parent; false if that is not there.
    fn adopt(&mut self, slot: SlotId) -> bool {
        let block = &mut self.blocks.hot[slot];
        // What is adopted is marked: a parent that is no orphan itself.
        let (parent, before) = (block.parent, block.position.checked_sub(1));
        let whose = (block.namespace, block.group);
        let whole = !parent.is_some()
            || self.blocks.hot.get(parent).is_some_and(|parent| {
                parent.blocked && Some(parent.position) == before && (parent.namespace, parent.group) == whose
            });
        self.blocks.hot[slot].blocked = whole;
        if whole {
            self.blocks.attach(slot);
        }
        whole
    }

    fn evict_orphan(&mut self, slot: SlotId) {
        self.blocks_by_state.ready -= 1;
        self.index.remove(&self.blocks.hot, slot);
        self.table.evict(slot);
        self.forget(slot);
    }

    fn order(&mut self, mut kept: Vec<Ordered>) {
        kept.sort_unstable();
        for (touched, _, slot) in kept {
            let now = Ticks(u64::from(touched));
            self.blocks.hot[slot].blocked = false;
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
