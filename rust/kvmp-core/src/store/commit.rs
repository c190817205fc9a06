//! Commit and abort, part by part.
//!
//! A part is open from the grant until its writer commits or aborts it. A slot whose parts are all
//! committed is Ready. One whose part was aborted is Quarantined, out of index and chain, until the
//! others are closed too: somebody may still be writing into it.

use crate::ids::{EngineToken, LeaseId, NamespaceId, PartId, SlotId};
use crate::slot::{PartSum, SlotWord};

use super::BlockStore;
use super::answers::{AbortReply, CommitReply};
use super::blocks::{Block, BlockState};
use super::leases::WriteLease;
use super::table::SlotTable;

impl<T: SlotTable> BlockStore<T> {
    /// Commits one part of each of these slots, named with the words they were granted with.
    pub fn commit(
        &mut self,
        engine: EngineToken,
        lease: LeaseId,
        part: PartId,
        slots: &[(SlotId, SlotWord, PartSum)],
    ) -> CommitReply {
        let mut reply = CommitReply::default();
        for &(slot, word, sum) in slots {
            match self.close_part(engine, lease, part, slot, word) {
                Some(place) => {
                    reply.committed += 1;
                    reply.ready += u32::from(self.part_committed(lease, place, part, sum));
                }
                None => reply.refused += 1,
            }
        }
        self.drop_if_done(lease);
        self.counters.committed_parts += u64::from(reply.committed);
        self.counters.committed_blocks += u64::from(reply.ready);
        self.counters.refused_parts += u64::from(reply.refused);
        reply
    }

    /// Aborts one part of each of these slots: its writer will not write it any more.
    pub fn abort(
        &mut self,
        engine: EngineToken,
        lease: LeaseId,
        part: PartId,
        slots: &[(SlotId, SlotWord)],
    ) -> AbortReply {
        let mut reply = AbortReply::default();
        for &(slot, word) in slots {
            match self.close_part(engine, lease, part, slot, word) {
                Some(place) => {
                    reply.aborted += 1;
                    self.part_aborted(lease, place);
                }
                None => reply.refused += 1,
            }
        }
        self.drop_if_done(lease);
        self.counters.refused_parts += u64::from(reply.refused);
        reply
    }

    /// A reader found this block's bytes wrong: it is evicted with all that hangs on it, pinned or not, and what is being
    /// written behind it never becomes visible. Returns whether the block was still there.
    pub fn distrust(&mut self, slot: SlotId, word: SlotWord) -> bool {
        let same = |block: &Block| block.state == BlockState::Ready && block.word == word;
        let found = self.blocks.hot.get(slot).is_some_and(same);
        if found {
            self.counters.distrusted_blocks += 1;
            self.take_down(slot);
        }
        found
    }

    /// Namespace of the block that a slot has, if it has one.
    #[must_use]
    pub fn namespace_of(&self, slot: SlotId) -> Option<NamespaceId> {
        self.blocks.hot.get(slot).filter(|block| block.state != BlockState::Free).map(|block| block.namespace)
    }

    /// Namespace of a write lease, while the lease is there.
    #[must_use]
    pub fn lease_namespace(&self, lease: LeaseId) -> Option<NamespaceId> {
        self.writes.get(&lease).map(|entry| entry.namespace)
    }

    /// Aborts every part of every slot: the scheduler told no worker of this lease. Returns whether the
    /// engine has this write lease.
    pub fn cancel(&mut self, engine: EngineToken, lease: LeaseId) -> bool {
        let owned = self.writes.get(&lease).is_some_and(|entry| entry.engine == engine);
        if owned {
            self.abort_parts(lease, None);
        }
        owned
    }

    /// Closes a part of a slot that was granted with `word` and is still in this lease; its place there.
    fn close_part(
        &mut self,
        engine: EngineToken,
        lease: LeaseId,
        part: PartId,
        slot: SlotId,
        word: SlotWord,
    ) -> Option<usize> {
        let entry = self.writes.get_mut(&lease).filter(|entry| entry.engine == engine && part.0 < entry.parts)?;
        let place = self.blocks.links.get(slot)?.place as usize;
        let same = entry.slots.get(place) == Some(&slot) && self.blocks.hot[slot].word == word;
        (same && entry.close(place, part)).then_some(place)
    }

    /// Returns whether the block became Ready.
    fn part_committed(&mut self, lease: LeaseId, place: usize, part: PartId, sum: PartSum) -> bool {
        let Some(entry) = self.writes.get_mut(&lease) else { return false };
        let slot = entry.slots[place];
        if self.blocks.hot[slot].state == BlockState::Writing {
            entry.note(place, part, sum);
        }
        if entry.is_open(place) {
            return false;
        }
        let ready = self.blocks.hot[slot].state == BlockState::Writing;
        if ready {
            self.make_ready(lease, place);
        }
        self.all_closed(lease, place);
        ready
    }

    fn make_ready(&mut self, lease: LeaseId, place: usize) {
        let Some(entry) = self.writes.get(&lease) else { return };
        let slot = entry.slots[place];
        let word = self.table.commit(slot, entry.sums_of(place));
        let block = &mut self.blocks.hot[slot];
        (block.word, block.state) = (word, BlockState::Ready);
        self.blocks_by_state.writing -= 1;
        self.blocks_by_state.ready += 1;
    }

    pub(super) fn part_aborted(&mut self, lease: LeaseId, place: usize) {
        self.counters.aborted_parts += 1;
        let Some(slot) = self.writes.get(&lease).map(|entry| entry.slots[place]) else { return };
        if self.blocks.hot[slot].state == BlockState::Writing {
            self.take_down(slot);
        }
        if self.writes.get(&lease).is_some_and(|entry| !entry.is_open(place)) {
            self.all_closed(lease, place);
        }
    }

    /// Every part of a slot is closed: it leaves its lease, and is Free if it was Quarantined.
    fn all_closed(&mut self, lease: LeaseId, place: usize) {
        let Some(entry) = self.writes.get_mut(&lease) else { return };
        let WriteLease { engine, pages, .. } = *entry;
        let slot = std::mem::replace(&mut entry.slots[place], SlotId::NONE);
        entry.left -= 1;
        self.engine(engine).writing -= u64::from(pages);
        if self.blocks.hot[slot].state == BlockState::Quarantined {
            self.end_quarantine(slot);
        } else {
            self.maybe_evictable(slot);
        }
        self.wake_drain();
    }

    /// Makes a Quarantined slot Free.
    pub(super) fn end_quarantine(&mut self, slot: SlotId) {
        self.blocks_by_state.quarantined -= 1;
        self.table.evict(slot);
        self.forget(slot);
    }

    /// Takes a block and all that hangs on it out of index and chain, deepest first: Ready blocks are evicted, Writing
    /// ones Quarantined.
    fn take_down(&mut self, root: SlotId) {
        let mut at = root;
        loop {
            let leaf = self.blocks.first_leaf(at);
            at = self.blocks.hot[leaf].parent;
            if self.blocks.hot[leaf].state == BlockState::Ready {
                if self.blocks.hot[leaf].pins > 0 {
                    self.drop_all_pins(leaf);
                }
                self.evict_leaf(leaf);
            } else {
                self.take_out(leaf);
                self.blocks.hot[leaf].state = BlockState::Quarantined;
                self.blocks_by_state.writing -= 1;
                self.blocks_by_state.quarantined += 1;
            }
            if leaf == root {
                return;
            }
        }
    }

    /// Aborts the open parts of a lease, or only one part of each slot, and grants nothing more under it.
    pub(super) fn abort_parts(&mut self, lease: LeaseId, part: Option<PartId>) {
        let Some(entry) = self.writes.get_mut(&lease) else { return };
        entry.building = false;
        for place in 0..self.writes.get(&lease).map_or(0, |entry| entry.slots.len()) {
            self.abort_place(lease, place, part);
        }
        self.drop_if_done(lease);
    }

    fn abort_place(&mut self, lease: LeaseId, place: usize, part: Option<PartId>) {
        let Some(entry) = self.writes.get_mut(&lease) else { return };
        let open = entry.open_parts(place);
        for open in open.into_iter().filter(|open| part.is_none_or(|part| part == *open)) {
            if let Some(entry) = self.writes.get_mut(&lease) {
                entry.close(place, open);
            }
            self.part_aborted(lease, place);
        }
    }
}
