//! Reserve: per key, a slot to write or the reason why there is none.
//!
//! It is sliced as lookup is. In a prefix group a block needs the one before it to be Ready or Writing;
//! a Ready one that is being extended is pinned until the end. What is granted is a prefix of what could
//! be: after the first key that got no room nothing more is granted.

use crate::clock::Ticks;
use crate::ids::{BlockKey, EngineToken, GroupId, LeaseId, NamespaceId, SlotId};
use crate::namespace::GroupRule;
use crate::slot::{BlockIdentity, SlotState, SlotWord};

use super::BlockStore;
use super::answers::{ReserveAnswer, ReserveReply, StoreError};
use super::blocks::{Block, BlockState};
use super::leases::WriteLease;
use super::namespaces::Group;
use super::table::SlotTable;

/// A reservation between two slices.
#[derive(Debug)]
pub struct ReserveCursor {
    lease: LeaseId,
    now: Ticks,
    namespace: NamespaceId,
    group: GroupId,
    prefix: bool,
    /// Position of the next key's block.
    position: u32,
    /// The block before the next one, with the generation it had; `NONE` at a chain's head and outside
    /// prefix groups.
    before: (SlotId, SlotWord),
    /// Why nothing more is granted.
    stopped: Option<ReserveAnswer>,
    granted: u32,
    /// A chunk of another slot size may still be tried for in this slice.
    may_move: bool,
}

const HEAD: (SlotId, SlotWord) = (SlotId::NONE, SlotWord(0));

impl<T: SlotTable> BlockStore<T> {
    /// Starts a reservation of blocks from position `first_block` on. In a prefix group `parent` is the
    /// key of the block before it, given unless `first_block` is 0; elsewhere it is not looked at.
    pub fn reserve_begin(
        &mut self,
        engine: EngineToken,
        namespace: NamespaceId,
        group: GroupId,
        parent: Option<BlockKey>,
        first_block: u32,
        now: Ticks,
    ) -> Result<ReserveCursor, StoreError> {
        let Group { rule, pages, .. } = *self.namespace_group(namespace, group)?;
        let parts = self.namespace(namespace)?.parts;
        let prefix = rule == GroupRule::Prefix;
        if prefix && parent.is_some() != (first_block > 0) {
            return Err(StoreError::Parent { first_block, parent });
        }
        self.counters.reserves += 1;
        let before = parent.filter(|_| prefix).map(|key| self.parent_block(namespace, group, &key, first_block));
        let stopped = matches!(before, Some(None)).then_some(ReserveAnswer::NoParent);
        let lease = self.new_lease();
        self.writes.insert(lease, WriteLease::new(engine, namespace, pages, parts));
        self.engine(engine);
        let mut cursor = ReserveCursor {
            lease,
            now,
            namespace,
            group,
            prefix,
            position: first_block,
            before: before.flatten().unwrap_or(HEAD),
            stopped,
            granted: 0,
            may_move: true,
        };
        self.guard_before(&mut cursor);
        Ok(cursor)
    }

    /// Answers the next keys, one answer each.
    pub fn reserve_step(&mut self, cursor: &mut ReserveCursor, keys: &[BlockKey], answers: &mut Vec<ReserveAnswer>) {
        cursor.may_move = true;
        self.check_before(cursor);
        for key in keys {
            let answer = self.reserve_one(cursor, key);
            self.counters.count_answer(answer);
            answers.push(answer);
            cursor.position = cursor.position.saturating_add(1);
        }
        self.guard_before(cursor);
    }

    /// Ends a reservation; from now on its lease ends with its last slot. To give one up between two
    /// slices, finish it and `cancel` its lease.
    pub fn reserve_finish(&mut self, cursor: ReserveCursor) -> ReserveReply {
        self.guard(cursor.lease, None);
        if let Some(lease) = self.writes.get_mut(&cursor.lease) {
            lease.building = false;
        }
        self.drop_if_done(cursor.lease);
        let lease = (cursor.granted > 0).then_some(cursor.lease);
        ReserveReply { lease, granted: cursor.granted }
    }

    fn parent_block(
        &self,
        namespace: NamespaceId,
        group: GroupId,
        key: &BlockKey,
        first_block: u32,
    ) -> Option<(SlotId, SlotWord)> {
        let slot = self.find(namespace, group, key)?;
        let block = &self.blocks.hot[slot];
        (block.position.checked_add(1) == Some(first_block)).then_some((slot, block.word))
    }

    /// Between two slices the block before may have gone.
    fn check_before(&self, cursor: &mut ReserveCursor) {
        let (slot, word) = cursor.before;
        if slot.is_some() && cursor.stopped.is_none() && !self.is_resident(slot, word) {
            cursor.stopped = Some(ReserveAnswer::NoParent);
        }
    }

    /// Ready or Writing, and the same grant.
    fn is_resident(&self, slot: SlotId, word: SlotWord) -> bool {
        self.blocks.hot.get(slot).is_some_and(|block| {
            matches!(block.state, BlockState::Ready | BlockState::Writing)
                && block.word.generation() == word.generation()
        })
    }

    /// Pins the block before if it is Ready; a Writing one is not evicted anyway.
    fn guard_before(&mut self, cursor: &mut ReserveCursor) {
        let (slot, word) = cursor.before;
        if slot.is_some() && cursor.stopped.is_none() && self.blocks.is_ready(slot, word) {
            self.guard(cursor.lease, Some(slot));
        }
    }

    fn reserve_one(&mut self, cursor: &mut ReserveCursor, key: &BlockKey) -> ReserveAnswer {
        if let Some(stopped) = cursor.stopped.filter(|_| cursor.prefix) {
            return stopped;
        }
        let answer = match self.find(cursor.namespace, cursor.group, key) {
            Some(slot) => self.resident_answer(cursor, slot),
            None => cursor.stopped.unwrap_or_else(|| self.grant(cursor, key)),
        };
        match answer {
            ReserveAnswer::Granted(..) => cursor.granted += 1,
            ReserveAnswer::Present | ReserveAnswer::Pending => {}
            // What comes after a block that is not there has no parent.
            _ if cursor.prefix => cursor.stopped = Some(ReserveAnswer::NoParent),
            ReserveAnswer::NotAdmitted => {}
            none => cursor.stopped = Some(none),
        }
        answer
    }

    fn resident_answer(&self, cursor: &mut ReserveCursor, slot: SlotId) -> ReserveAnswer {
        let block = &self.blocks.hot[slot];
        if cursor.prefix {
            // A key that is elsewhere in a chain has another predecessor than this list says.
            if block.position != cursor.position || block.parent != cursor.before.0 {
                return ReserveAnswer::NoParent;
            }
            cursor.before = (slot, block.word);
        }
        if block.state == BlockState::Ready { ReserveAnswer::Present } else { ReserveAnswer::Pending }
    }

    fn grant(&mut self, cursor: &mut ReserveCursor, key: &BlockKey) -> ReserveAnswer {
        let Ok(Group { class, pages, bytes, .. }) = self.namespace_group(cursor.namespace, cursor.group).cloned()
        else {
            return ReserveAnswer::NoSpace;
        };
        if !self.may_write(cursor.lease, pages) {
            return ReserveAnswer::NoSpace;
        }
        if !self.classes[class].policy.admits(cursor.now) {
            return ReserveAnswer::NotAdmitted;
        }
        self.guard_before(cursor);
        let slot = match self.take_slot(class, cursor.now, &mut cursor.may_move) {
            Ok(slot) => slot,
            Err(answer) => return answer,
        };
        let word = self.write_grant(cursor, slot, key, bytes);
        if cursor.prefix {
            cursor.before = (slot, word);
        }
        ReserveAnswer::Granted(slot, word)
    }

    /// Whether the lease may still grow: its engine is there, and under its cap with one slot more.
    fn may_write(&mut self, lease: LeaseId, pages: u32) -> bool {
        let cap = self.cap_pages;
        let building = self.writes.get(&lease).filter(|lease| lease.building);
        let Some(engine) = building.map(|lease| lease.engine) else { return false };
        self.engine(engine).writing + u64::from(pages) <= cap
    }

    fn write_grant(&mut self, cursor: &ReserveCursor, slot: SlotId, key: &BlockKey, bytes: u32) -> SlotWord {
        let identity = BlockIdentity {
            key: *key,
            namespace: cursor.namespace,
            group: cursor.group,
            position: cursor.position,
            parent: cursor.before.0,
            bytes,
        };
        let word = self.table.grant(slot, &identity);
        debug_assert_eq!(word.state(), Ok(SlotState::Writing));
        // The record may hold the time of the block that was there before.
        self.table.touch(slot, cursor.now.touched());
        self.describe(slot, &identity, word, BlockState::Writing);
        self.index.insert(&self.blocks.hot, slot);
        self.count_in(identity.namespace, BlockState::Writing);
        self.blocks.attach(slot);
        let class = self.class_at(slot);
        self.classes[class].policy.insert(slot, cursor.now);
        self.heat(slot, cursor.now);
        self.hold(cursor.lease, slot);
        word
    }

    /// Sets a slot's fields; it is in no index, chain or count yet.
    pub(super) fn describe(&mut self, slot: SlotId, identity: &BlockIdentity, word: SlotWord, state: BlockState) {
        let BlockIdentity { key, namespace, group, position, parent, .. } = *identity;
        let child = SlotId::NONE;
        self.blocks.hot[slot] =
            Block { key, word, parent, child, position, pins: 0, namespace, group, state, blocked: false };
    }

    /// Counts a block that is in the index.
    #[inline]
    pub(super) fn count_in(&mut self, namespace: NamespaceId, state: BlockState) {
        *self.blocks_by_state.of(state) += 1;
        if let Some(Some(namespace)) = self.namespaces.get_mut(usize::from(namespace.0)) {
            namespace.slots += 1;
        }
    }

    /// Puts a granted slot into its lease.
    fn hold(&mut self, lease: LeaseId, slot: SlotId) {
        let Some(entry) = self.writes.get_mut(&lease) else { return };
        self.blocks.links[slot].place = entry.push(slot);
        let (engine, pages) = (entry.engine, u64::from(entry.pages));
        self.engine(engine).writing += pages;
    }
}
