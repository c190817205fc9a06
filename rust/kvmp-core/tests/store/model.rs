//! A block store told by its rules alone: maps, and a look at everything at each step.
//!
//! It does not choose slots or victims: it is told them (by the answers and the table's log) and says
//! whether they were allowed.

use std::collections::{BTreeMap, BTreeSet};

use kvmp_core::clock::Ticks;
use kvmp_core::ids::{BlockKey, EngineToken, LeaseId, SlotId};
use kvmp_core::namespace::GroupRule;
use kvmp_core::slot::{SlotState, SlotWord};
use kvmp_core::store::{LookupReply, ReserveAnswer};

use crate::logged::Event;

/// (namespace, group).
pub type Whose = (u16, u16);

#[derive(Clone, Debug)]
pub struct Block {
    pub whose: Whose,
    pub key: BlockKey,
    pub word: SlotWord,
    pub parent: Option<SlotId>,
    pub ready: bool,
    pub quarantined: bool,
    pub lease: LeaseId,
    pub open: BTreeSet<u16>,
    pub stamp: u64,
    pub position: u32,
    /// When it was granted or a hit ended at it: what its record says.
    pub touched: u32,
}

#[derive(Clone, Debug)]
pub struct Read {
    pub engine: EngineToken,
    pub pins: Vec<SlotId>,
    pub pages: u64,
    pub expires: Ticks,
}

/// What the model is told of a group.
#[derive(Clone, Copy, Debug)]
pub struct GroupFacts {
    pub rule: GroupRule,
    pub stride: usize,
    /// Blocks of the window.
    pub window: usize,
    pub pages: u64,
    pub parts: u16,
}

#[derive(Default)]
pub struct Model {
    pub groups: BTreeMap<Whose, GroupFacts>,
    pub blocks: BTreeMap<SlotId, Block>,
    pub reads: BTreeMap<LeaseId, Read>,
    pub writers: BTreeMap<LeaseId, EngineToken>,
    pub cap_pages: u64,
    /// Slots there are, if all have one size: then room and order are checked exactly.
    pub capacity: Option<usize>,
    pub warming: bool,
    pub stamps: u64,
    /// The time now, as records have it.
    pub now: u32,
}

type Check = Result<(), String>;

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(why()) }
}

impl Model {
    pub fn stamp(&mut self) -> u64 {
        self.stamps += 1;
        self.stamps
    }

    pub fn find(&self, whose: Whose, key: &BlockKey) -> Option<SlotId> {
        let found = self.blocks.iter().find(|(_, b)| !b.quarantined && b.whose == whose && b.key == *key);
        found.map(|(slot, _)| *slot)
    }

    fn find_ready(&self, whose: Whose, key: &BlockKey) -> Option<SlotId> {
        self.find(whose, key).filter(|slot| self.blocks[slot].ready)
    }

    fn children(&self, slot: SlotId) -> Vec<SlotId> {
        let below = self.blocks.iter().filter(|(_, b)| b.parent == Some(slot) && !b.quarantined);
        below.map(|(slot, _)| *slot).collect()
    }

    fn pinned(&self, slot: SlotId) -> bool {
        self.reads.values().any(|read| read.pins.contains(&slot))
    }

    fn evictable(&self, slot: SlotId, guard: Option<SlotId>) -> bool {
        self.blocks[&slot].ready && !self.pinned(slot) && guard != Some(slot) && self.children(slot).is_empty()
    }

    /// It, or what hangs on it, is pinned or Writing.
    fn blocked(&self, slot: SlotId) -> bool {
        !self.blocks[&slot].ready || self.pinned(slot) || self.children(slot).into_iter().any(|c| self.blocked(c))
    }

    fn remove(&mut self, slot: SlotId) {
        let Some(block) = self.blocks.remove(&slot) else { return };
        if let Some(parent) = block.parent.filter(|_| !block.quarantined).and_then(|p| self.blocks.get_mut(&p)) {
            parent.stamp = parent.stamp.max(block.stamp);
        }
    }

    /// A victim must be allowed to go; with one slot size it must be the coldest, and there is no room.
    pub fn evicted(&mut self, slot: SlotId, guard: Option<SlotId>) -> Check {
        ensure(self.blocks.contains_key(&slot), || format!("{slot:?} evicted, nothing is there"))?;
        ensure(self.evictable(slot, guard), || format!("{slot:?} evicted: {:?}", self.blocks[&slot]))?;
        if self.capacity.is_some() {
            let coldest = self.candidates(guard).into_iter().min_by_key(|slot| self.blocks[slot].stamp);
            ensure(coldest == Some(slot), || format!("{slot:?} evicted, {coldest:?} is colder"))?;
        }
        self.remove(slot);
        Ok(())
    }

    fn candidates(&self, guard: Option<SlotId>) -> Vec<SlotId> {
        self.blocks.keys().copied().filter(|slot| self.evictable(*slot, guard)).collect()
    }

    fn full(&self) -> bool {
        self.capacity.is_none_or(|capacity| self.blocks.len() >= capacity)
    }

    fn writing_pages(&self, engine: EngineToken) -> u64 {
        let own = self.blocks.values().filter(|b| !b.ready && self.writers.get(&b.lease) == Some(&engine));
        own.map(|b| self.groups[&b.whose].pages).sum()
    }

    /// Checks one answer of a reservation. `events` are those of the whole call not looked at yet.
    #[expect(clippy::too_many_arguments, reason = "a reservation's whole context")]
    pub fn answered(
        &mut self,
        engine: EngineToken,
        whose: Whose,
        key: &BlockKey,
        position: u32,
        before: &mut Option<Option<SlotId>>,
        stopped: &mut bool,
        lease: LeaseId,
        answer: ReserveAnswer,
        events: &mut std::collections::VecDeque<Event>,
    ) -> Check {
        let facts = self.groups[&whose];
        let prefix = facts.rule == GroupRule::Prefix;
        let Some(previous) = *before else {
            return ensure(answer == ReserveAnswer::NoParent, || format!("{answer:?} without a parent"));
        };
        if let Some(slot) = self.find(whose, key) {
            let ready = self.blocks[&slot].ready;
            let expected = if ready { ReserveAnswer::Present } else { ReserveAnswer::Pending };
            *before = Some(prefix.then_some(slot));
            return ensure(answer == expected, || format!("{answer:?} for {:?}", self.blocks[&slot]));
        }
        let capped = self.writing_pages(engine) + facts.pages > self.cap_pages;
        if let ReserveAnswer::Granted(slot, word) = answer {
            ensure(!capped && !*stopped, || format!("granted over the cap ({capped}) or after a stop ({stopped})"))?;
            let guard = previous.filter(|slot| self.blocks[slot].ready);
            self.room_made(slot, guard, events)?;
            let open = (0..facts.parts).collect();
            let stamp = self.stamp();
            let (ready, quarantined, parent) = (false, false, previous);
            let touched = self.now;
            let block =
                Block { whose, key: *key, word, parent, ready, quarantined, lease, open, stamp, position, touched };
            ensure(self.blocks.insert(slot, block).is_none(), || format!("{slot:?} granted twice"))?;
            *before = Some(prefix.then_some(slot));
            return Ok(());
        }
        if prefix {
            *before = None;
        }
        self.no_room(answer, capped || std::mem::replace(stopped, true), previous, events)
    }

    fn room_made(
        &mut self,
        granted: SlotId,
        guard: Option<SlotId>,
        events: &mut std::collections::VecDeque<Event>,
    ) -> Check {
        while let Some(event) = events.pop_front() {
            match event {
                Event::Evict(slot) => {
                    ensure(self.full() && !self.warming, || format!("{slot:?} evicted though there is room"))?;
                    self.evicted(slot, guard)?;
                }
                Event::Grant(slot) => return ensure(slot == granted, || format!("{slot:?} granted, not {granted:?}")),
                Event::Ready(slot) => return Err(format!("{slot:?} Ready in a reservation")),
            }
        }
        Err(format!("{granted:?} answered, not granted"))
    }

    fn no_room(
        &mut self,
        answer: ReserveAnswer,
        refused: bool,
        previous: Option<SlotId>,
        events: &mut std::collections::VecDeque<Event>,
    ) -> Check {
        // What was evicted in vain (for another slot size's draining chunk) had to be allowed, too.
        while let Some(Event::Evict(slot)) = events.front().copied() {
            self.evicted(slot, previous.filter(|slot| self.blocks[slot].ready))?;
            events.pop_front();
        }
        let room = || !self.full() || (self.capacity.is_some() && !self.candidates(previous).is_empty());
        match answer {
            ReserveAnswer::NoSpace => ensure(refused || !room(), || "no space, but there was room".into()),
            ReserveAnswer::Warming => ensure(self.warming && self.full(), || "warming, but is not".into()),
            other => Err(format!("{other:?} for a key that is nowhere")),
        }
    }

    /// The largest token count that satisfies every group, by trying each; in hashes.
    pub fn best_hit(&self, namespace: u16, keys: &[BlockKey]) -> usize {
        (1..=keys.len()).rev().find(|hashes| self.hit_blocks(namespace, keys, *hashes).is_some()).unwrap_or(0)
    }

    /// The blocks of a hit of so many hashes, by group, if all are there.
    fn hit_blocks(&self, namespace: u16, keys: &[BlockKey], hashes: usize) -> Option<Vec<(usize, Vec<SlotId>)>> {
        let groups = self.groups.range((namespace, 0)..=(namespace, u16::MAX));
        groups.map(|(whose, facts)| self.group_blocks(*whose, facts, keys, hashes)).collect()
    }

    fn group_blocks(
        &self,
        whose: Whose,
        facts: &GroupFacts,
        keys: &[BlockKey],
        hashes: usize,
    ) -> Option<(usize, Vec<SlotId>)> {
        if !hashes.is_multiple_of(facts.stride) {
            return None;
        }
        let end = hashes / facts.stride;
        let first = match facts.rule {
            GroupRule::Prefix => 0,
            GroupRule::Window => end.saturating_sub(facts.window),
            GroupRule::State => end - 1,
        };
        let block = |b: usize| self.find_ready(whose, &keys[(b + 1) * facts.stride - 1]);
        Some((first, (first..end).map(block).collect::<Option<_>>()?))
    }

    /// Checks a lookup's reply against what is there, and takes over its touches and pins.
    pub fn looked_up(
        &mut self,
        engine: EngineToken,
        namespace: u16,
        keys: &[BlockKey],
        reply: &LookupReply,
        expires: Ticks,
    ) -> Check {
        let best = self.best_hit(namespace, keys);
        ensure(reply.tokens as usize == best * 16, || format!("{} tokens hit, not {}", reply.tokens, best * 16))?;
        if best == 0 {
            return ensure(reply.lease.is_none(), || "a lease on nothing".into());
        }
        let expected = self.hit_blocks(namespace, keys, best).unwrap_or_default();
        let (mut pins, mut pages) = (Vec::new(), 0);
        for (id, ((first, slots), hit)) in expected.into_iter().zip(&reply.groups).enumerate() {
            let words: Vec<_> = slots.iter().map(|slot| (*slot, self.blocks[slot].word)).collect();
            ensure(hit.slots == words && hit.first_block as usize == first, || {
                format!("group {id}: {hit:?}, not {words:?}")
            })?;
            let facts = self.groups[&(namespace, id as u16)];
            pages += slots.len() as u64 * facts.pages;
            let from = if facts.rule == GroupRule::Prefix { slots.len() - 1 } else { 0 };
            for &slot in &slots[from..] {
                let (stamp, touched) = (self.stamp(), self.now);
                self.blocks.entry(slot).and_modify(|block| (block.stamp, block.touched) = (stamp, touched));
                pins.push(slot);
            }
        }
        let held: u64 = self.reads.values().filter(|read| read.engine == engine).map(|read| read.pages).sum();
        match reply.lease {
            Some(lease) => {
                ensure(held + pages <= self.cap_pages, || format!("{lease:?} is over the cap"))?;
                let fresh = self.reads.insert(lease, Read { engine, pins, pages, expires }).is_none();
                ensure(fresh, || format!("{lease:?} given twice"))
            }
            None => ensure(self.may_be_capped(held, pages, namespace, keys), || "no pin under the cap".into()),
        }
    }

    /// While it ran, a lookup of several groups may have held more than its hit came to.
    fn may_be_capped(&self, held: u64, pages: u64, namespace: u16, keys: &[BlockKey]) -> bool {
        let groups = self.groups.range((namespace, 0)..=(namespace, u16::MAX));
        let most: u64 = groups.map(|(_, facts)| keys.len().div_ceil(facts.stride) as u64 * facts.pages).sum();
        held + pages.max(most) > self.cap_pages
    }

    /// A part is closed by a commit.
    pub fn commit(&mut self, slot: SlotId, part: u16) {
        let Some(block) = self.blocks.get_mut(&slot) else { return };
        block.open.remove(&part);
        if !block.open.is_empty() {
            return;
        }
        if block.quarantined {
            self.blocks.remove(&slot);
        } else {
            block.ready = true;
            block.word = block.word.with_state(SlotState::Ready);
        }
    }

    /// A part is closed by an abort.
    pub fn abort(&mut self, slot: SlotId, part: u16) {
        self.quarantine(slot);
        let Some(block) = self.blocks.get_mut(&slot) else { return };
        block.open.remove(&part);
        if block.open.is_empty() {
            self.blocks.remove(&slot);
        }
    }

    fn quarantine(&mut self, slot: SlotId) {
        if self.blocks[&slot].quarantined {
            return;
        }
        for child in self.children(slot) {
            self.quarantine(child);
        }
        if self.blocks[&slot].ready {
            self.remove(slot);
            return;
        }
        let stamp = self.blocks[&slot].stamp;
        if let Some(parent) = self.blocks[&slot].parent.and_then(|p| self.blocks.get_mut(&p)) {
            parent.stamp = parent.stamp.max(stamp);
        }
        self.blocks.entry(slot).and_modify(|block| block.quarantined = true);
    }

    /// Slots that a lease holds and whose part is open, in no matter what order.
    pub fn open_in(&self, lease: LeaseId) -> Vec<(SlotId, SlotWord, BTreeSet<u16>)> {
        let held = self.blocks.iter().filter(|(_, b)| !b.ready && b.lease == lease);
        held.map(|(slot, b)| (*slot, b.word, b.open.clone())).collect()
    }

    /// Clears a namespace, or all.
    pub fn clear(&mut self, namespace: Option<u16>) -> u64 {
        let goes = |slot: &SlotId| {
            let own = namespace.is_none_or(|ns| ns == self.blocks[slot].whose.0);
            own && !self.blocked(*slot)
        };
        let gone: Vec<SlotId> = self.blocks.keys().copied().filter(goes).collect();
        // Deepest first, so that heat goes up the chain.
        let mut left: BTreeSet<SlotId> = gone.iter().copied().collect();
        while let Some(leaf) = left.iter().copied().find(|slot| self.children(*slot).is_empty()) {
            left.remove(&leaf);
            self.remove(leaf);
        }
        gone.len() as u64
    }

    /// Blocks that could be evicted one after the other.
    pub fn all_evictable(&self) -> u64 {
        self.blocks.keys().filter(|slot| !self.blocked(**slot)).count() as u64
    }
}
