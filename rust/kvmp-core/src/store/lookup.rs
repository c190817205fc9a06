//! Lookup: one hash list for all groups; a hit is the largest token count that satisfies every group.
//!
//! It is sliced: `lookup_begin`, `lookup_step` with up to 1,024 keys at a time and other calls in
//! between, `lookup_finish`. A prefix group's run is protected by a pin on its last block, moved on at
//! each step. Groups with another rule are resolved as the keys come and checked again at the end.

use crate::clock::Ticks;
use crate::ids::{BlockKey, EngineToken, GroupId, LeaseId, NamespaceId, SlotId};
use crate::namespace::GroupRule;
use crate::slot::SlotWord;

use super::BlockStore;
use super::answers::{GroupHit, LookupReply, StoreError};
use super::blocks::{Block, BlockState};
use super::index;
use super::leases::ReadLease;
use super::namespaces::{Group, Namespace};
use super::table::SlotTable;

/// A block that was not there, in a group that is not a prefix group.
const MISSING: (SlotId, SlotWord) = (SlotId::NONE, SlotWord(0));

/// A lookup between two slices.
#[derive(Debug)]
pub struct LookupCursor {
    engine: EngineToken,
    namespace: NamespaceId,
    now: Ticks,
    lease: Option<LeaseId>,
    groups: Vec<Found>,
    /// Position of the list's first block: a list longer than one request takes goes on in another.
    first_block: usize,
    /// Hashes seen.
    hashes: usize,
    /// A prefix group has ended: no further key can matter.
    ended: bool,
}

impl LookupCursor {
    /// The list goes on at this block of its chain: its first key is looked for there. For namespaces of one prefix
    /// group, whose earlier blocks the caller has found (and leased) already; called before the first step.
    #[must_use]
    pub fn going_on_at(mut self, first_block: u32) -> Self {
        self.first_block = first_block as usize;
        self
    }
}

/// What a group has found so far.
#[derive(Debug, Default)]
struct Found {
    /// From position 0 on; a prefix group's has no gap.
    blocks: Vec<(SlotId, SlotWord)>,
    /// A prefix group met a block that is not Ready.
    ended: bool,
}

impl<T: SlotTable> BlockStore<T> {
    /// Starts a lookup.
    pub fn lookup_begin(
        &mut self,
        engine: EngineToken,
        namespace: NamespaceId,
        now: Ticks,
    ) -> Result<LookupCursor, StoreError> {
        let groups = self.namespace(namespace)?.groups.iter().map(|_| Found::default()).collect();
        self.counters.lookups += 1;
        Ok(LookupCursor { engine, namespace, now, lease: None, groups, first_block: 0, hashes: 0, ended: false })
    }

    /// Takes the next keys, in order from the first. Returns whether further keys can matter.
    pub fn lookup_step(&mut self, cursor: &mut LookupCursor, keys: &[BlockKey]) -> bool {
        if cursor.ended || self.check_tips(cursor).is_err() {
            return false;
        }
        self.counters.lookup_blocks += keys.len() as u64;
        for group in 0..cursor.groups.len() {
            self.step_group(cursor, group, keys);
        }
        cursor.hashes += keys.len();
        self.pin_tips(cursor);
        !cursor.ended
    }

    /// Ends a lookup: touches what was hit and pins it, cap permitting.
    pub fn lookup_finish(&mut self, mut cursor: LookupCursor) -> LookupReply {
        let hit = self.check_tips(&mut cursor).ok().and_then(|()| self.settle(&mut cursor));
        let Some((tokens, groups)) = hit else {
            self.drop_pins(&mut cursor);
            let groups = vec![GroupHit::default(); cursor.groups.len()];
            return LookupReply { tokens: 0, lease: None, groups };
        };
        self.touch_hit(&cursor, &groups);
        let (pins, pages) = self.pins_of(&cursor, &groups);
        let lease = self.lease_pins(&mut cursor, pins, pages);
        self.counters.lookup_hit_blocks += groups.iter().map(|group| group.slots.len() as u64).sum::<u64>();
        LookupReply { tokens, lease, groups }
    }

    /// Gives a lookup up between two slices.
    pub fn lookup_abandon(&mut self, mut cursor: LookupCursor) {
        self.drop_pins(&mut cursor);
    }

    fn group(&self, cursor: &LookupCursor, group: usize) -> Option<&Group> {
        self.namespace(cursor.namespace).ok()?.groups.get(group)
    }

    fn step_group(&mut self, cursor: &mut LookupCursor, id: usize, keys: &[BlockKey]) {
        let Some(group) = self.group(cursor, id) else { return };
        let (stride, prefix) = (group.stride as usize, group.rule == GroupRule::Prefix);
        // The group's blocks end with the hashes stride-1, 2*stride-1, ... of the whole list.
        let first = stride - 1 - cursor.hashes % stride;
        let found = &mut cursor.groups[id];
        if prefix {
            let at = (id, cursor.first_block);
            self.step_prefix(cursor.namespace, at, cursor.now, found, keys.iter().skip(first).step_by(stride));
            cursor.ended |= found.ended;
        } else {
            self.step_others(cursor.namespace, id, found, keys.iter().skip(first).step_by(stride));
        }
    }

    /// In passes over the slice: table, then blocks, then keys. Each is short enough that the processor
    /// overlaps the misses of many keys.
    fn step_prefix<'a>(
        &mut self,
        namespace: NamespaceId,
        (group, first_block): (usize, usize),
        now: Ticks,
        found: &mut Found,
        keys: impl Iterator<Item = &'a BlockKey> + Clone,
    ) {
        if found.ended {
            return;
        }
        let (group, first) = (GroupId(group as u16), found.blocks.len());
        let (index, blocks) = (&self.index, &self.blocks.hot);
        let guesses = keys.clone().map(|key| index.guess(index::hash(namespace, group, key)));
        found.blocks.extend(guesses.map(|slot| (slot, SlotWord(0))));
        for (slot, word) in &mut found.blocks[first..] {
            *word = blocks.get(*slot).map_or(SlotWord(0), |block| block.word);
        }
        let mut position = first;
        for key in keys {
            let guess = found.blocks[position].0;
            let Some(slot) = self.ready_at(namespace, group, key, (first_block + position) as u32, guess) else {
                found.ended = true;
                break;
            };
            if slot != guess {
                found.blocks[position] = (slot, self.blocks.hot[slot].word);
            }
            self.heat(slot, now);
            position += 1;
        }
        found.blocks.truncate(position);
    }

    /// The Ready block of this key at this position; `guess` is where it probably is.
    #[inline]
    fn ready_at(
        &self,
        namespace: NamespaceId,
        group: GroupId,
        key: &BlockKey,
        position: u32,
        guess: SlotId,
    ) -> Option<SlotId> {
        let is_it = |block: &Block| block.key == *key && (block.namespace, block.group) == (namespace, group);
        let slot = match self.blocks.hot.get(guess) {
            Some(block) if is_it(block) => guess,
            Some(_) => self.find(namespace, group, key)?,
            None => return None,
        };
        let block = &self.blocks.hot[slot];
        (block.state == BlockState::Ready && block.position == position).then_some(slot)
    }

    fn step_others<'a>(
        &self,
        namespace: NamespaceId,
        group: usize,
        found: &mut Found,
        keys: impl Iterator<Item = &'a BlockKey>,
    ) {
        for key in keys {
            let slot = self.find(namespace, GroupId(group as u16), key);
            let ready = slot.filter(|slot| self.blocks.hot[*slot].state == BlockState::Ready);
            found.blocks.push(ready.map_or(MISSING, |slot| (slot, self.blocks.hot[slot].word)));
        }
    }

    /// A prefix run is there as long as its last block is. If that went between two slices (its pin was
    /// dropped), the lookup has hit nothing.
    fn check_tips(&self, cursor: &mut LookupCursor) -> Result<(), ()> {
        let Ok(namespace) = self.namespace(cursor.namespace) else {
            cursor.ended = true;
            return Err(());
        };
        for (group, found) in namespace.groups.iter().zip(&mut cursor.groups) {
            let tip = found.blocks.last().filter(|_| group.rule == GroupRule::Prefix);
            if tip.is_some_and(|(slot, word)| !self.blocks.is_ready(*slot, *word)) {
                found.blocks.clear();
                (found.ended, cursor.ended) = (true, true);
                return Err(());
            }
        }
        Ok(())
    }

    fn pin_tips(&mut self, cursor: &mut LookupCursor) {
        let Ok(namespace) = self.namespace(cursor.namespace) else { return };
        let (mut pins, mut pages) = (Vec::new(), 0);
        for (group, found) in namespace.groups.iter().zip(&cursor.groups) {
            if group.rule != GroupRule::Prefix {
                continue;
            }
            if let Some((slot, _)) = found.blocks.last() {
                pins.push(*slot);
                pages += found.blocks.len() as u64 * u64::from(group.pages);
            }
        }
        cursor.lease = self.lease_pins(cursor, pins, pages);
    }

    /// Moves the cursor's lease to these pins, or makes it; `None` if nothing is pinned then.
    fn lease_pins(&mut self, cursor: &mut LookupCursor, pins: Vec<SlotId>, pages: u64) -> Option<LeaseId> {
        if pins.is_empty() {
            self.drop_pins(cursor);
            return None;
        }
        let lease = cursor.lease.take().unwrap_or_else(|| {
            let lease = self.new_lease();
            let expires = cursor.now.after(self.config.read_ttl);
            self.reads.insert(lease, ReadLease { engine: cursor.engine, pins: Vec::new(), pages: 0, expires });
            lease
        });
        self.move_pins(lease, pins, pages).then_some(lease)
    }

    fn drop_pins(&mut self, cursor: &mut LookupCursor) {
        if let Some(lease) = cursor.lease.take() {
            self.end_read(lease);
        }
    }

    /// The largest token count that satisfies every group, with its blocks; `None` for 0.
    fn settle(&self, cursor: &mut LookupCursor) -> Option<(u32, Vec<GroupHit>)> {
        let namespace = self.namespace(cursor.namespace).ok()?;
        self.recheck(namespace, cursor);
        let found = &mut cursor.groups;
        let mut hashes = cursor.hashes - cursor.hashes % namespace.unit as usize;
        while hashes > 0 {
            let fits = |(group, found): (&Group, &Found)| group.fits(hashes, &found.blocks);
            // The first group that does not fit says how many hashes could be left.
            match namespace.groups.iter().zip(found.iter()).find_map(fits) {
                Some(fewer) => hashes = fewer - fewer % namespace.unit as usize,
                None => break,
            }
        }
        if hashes == 0 {
            return None;
        }
        let hits = namespace.groups.iter().zip(found).map(|(group, found)| {
            let blocks = group.needs(hashes);
            let slots = std::mem::take(&mut found.blocks);
            let slots = if blocks.start == 0 { truncated(slots, blocks.end) } else { slots[blocks.clone()].to_vec() };
            GroupHit { first_block: blocks.start as u32, slots }
        });
        Some((hashes as u32 * namespace.hash_tokens, hits.collect()))
    }

    /// Forgets blocks, found in earlier slices, that no pin has kept.
    fn recheck(&self, namespace: &Namespace, cursor: &mut LookupCursor) {
        for (group, found) in namespace.groups.iter().zip(&mut cursor.groups) {
            if group.rule == GroupRule::Prefix {
                continue;
            }
            for block in &mut found.blocks {
                if block.0.is_some() && !self.blocks.is_ready(block.0, block.1) {
                    *block = MISSING;
                }
            }
        }
    }

    /// In a prefix group the last block only; elsewhere no block inherits from another.
    fn touch_hit(&mut self, cursor: &LookupCursor, groups: &[GroupHit]) {
        for (id, hit) in groups.iter().enumerate() {
            let prefix = self.group(cursor, id).is_some_and(|group| group.rule == GroupRule::Prefix);
            let first = if prefix { hit.slots.len().saturating_sub(1) } else { 0 };
            for &(slot, _) in &hit.slots[first..] {
                self.touch(slot, cursor.now);
            }
        }
    }

    fn touch(&mut self, slot: SlotId, now: Ticks) {
        let class = self.class_at(slot);
        self.classes[class].policy.touch(slot, now);
        self.table.touch(slot, now.touched());
        self.heat(slot, now);
    }

    fn pins_of(&self, cursor: &LookupCursor, groups: &[GroupHit]) -> (Vec<SlotId>, u64) {
        let (mut pins, mut pages) = (Vec::new(), 0);
        for (id, hit) in groups.iter().enumerate() {
            let Some(group) = self.group(cursor, id) else { continue };
            let first = if group.rule == GroupRule::Prefix { hit.slots.len().saturating_sub(1) } else { 0 };
            pins.extend(hit.slots[first..].iter().map(|(slot, _)| *slot));
            pages += hit.slots.len() as u64 * u64::from(group.pages);
        }
        (pins, pages)
    }
}

fn truncated(mut slots: Vec<(SlotId, SlotWord)>, len: usize) -> Vec<(SlotId, SlotWord)> {
    slots.truncate(len);
    slots
}
