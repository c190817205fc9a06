//! Recomputes everything the store believes of itself.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{ChunkId, EngineToken, NamespaceId, SlotId};
use crate::slot::SlotState;

use super::blocks::{Block, BlockState, evictable};
use super::chunks::Chunk;
use super::leases::Engine;
use super::stats::ByState;
use super::table::{ChunkState, SlotTable};
use super::{BlockStore, index};

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

impl<T: SlotTable> BlockStore<T> {
    /// Recomputes every counter, list, index entry and link. Says what is wrong first.
    pub fn validate(&self) -> Result<(), String> {
        self.check_chunks()?;
        let slots = self.all_slots();
        slots.iter().try_for_each(|slot| self.check_slot_state(*slot))?;
        slots.iter().try_for_each(|slot| self.check_chain(*slot))?;
        self.check_index(&slots)?;
        self.check_counts(&slots)?;
        self.check_pins(&slots)?;
        self.check_writes(&slots)?;
        self.check_engines()?;
        (0..self.classes.len()).try_for_each(|class| self.check_policy(class))
    }

    fn all_slots(&self) -> Vec<SlotId> {
        (0..self.config.geometry.chunks).flat_map(|chunk| self.blocks.hot.slots_in(ChunkId(chunk))).collect()
    }

    fn check_chunks(&self) -> Result<(), String> {
        let count = |state: ChunkState| self.chunks.all.iter().filter(|chunk| chunk.state == state).count();
        let (cold, free) = (count(ChunkState::Cold), count(ChunkState::Free));
        ensure(self.chunks.cold as usize == cold, || format!("{cold} chunks are Cold, counted {}", self.chunks.cold))?;
        let listed: BTreeSet<_> = self.chunks.free.iter().collect();
        ensure(listed.len() == free && self.chunks.free.len() == free, || {
            format!("{free} chunks are Free, listed {:?}", self.chunks.free)
        })?;
        for (id, chunk) in self.chunks.all.iter().enumerate() {
            self.check_chunk(ChunkId(id as u32), chunk)?;
        }
        let draining = |chunk: &&Chunk| matches!(chunk.state, ChunkState::Draining { .. });
        let drains = self.chunks.all.iter().filter(draining).count();
        ensure(drains == usize::from(self.draining.is_some()), || format!("{drains} chunks drain"))
    }

    fn check_chunk(&self, id: ChunkId, chunk: &Chunk) -> Result<(), String> {
        let slots = self.blocks.hot.slots_of(id);
        if !chunk.state.has_slots() {
            ensure(slots == 0, || format!("{id:?} is {:?} and has slots", chunk.state))?;
            let free = chunk.state != ChunkState::Free || self.chunks.free.contains(&id);
            return ensure(free, || format!("{id:?} is Free and not listed"));
        }
        let class = &self.classes[chunk.class];
        ensure(slots == class.slots, || format!("{id:?} has {slots} slots, not {}", class.slots))?;
        let drains = matches!(chunk.state, ChunkState::Draining { .. });
        ensure(!drains || self.draining.as_ref().is_some_and(|d| d.chunk == id), || format!("{id:?} drains alone"))?;
        let free = self.free_list(chunk)?;
        ensure(chunk.used + free + (slots - chunk.fresh) == slots, || {
            format!("{id:?}: {} used, {free} free, fresh from {} of {slots}", chunk.used, chunk.fresh)
        })?;
        let open = class.open.iter().filter(|open| **open == id).count();
        ensure(open <= 1 && (drains || open == usize::from(chunk.listed)), || format!("{id:?} is open {open} times"))?;
        ensure(chunk.listed || drains || chunk.used == slots, || format!("{id:?} has Free slots and is not open"))
    }

    fn free_list(&self, chunk: &Chunk) -> Result<u32, String> {
        let (mut at, mut count) = (chunk.free, 0);
        while at.is_some() {
            let state = self.blocks.hot[at].state;
            ensure(state == BlockState::Free, || format!("{at:?} is {state:?} in the free list"))?;
            ensure(count < self.config.geometry.chunk_pages(), || format!("the free list loops at {at:?}"))?;
            (at, count) = (self.blocks.links[at].next, count + 1);
        }
        Ok(count)
    }

    fn check_slot_state(&self, slot: SlotId) -> Result<(), String> {
        let block = &self.blocks.hot[slot];
        let word = self.table.word(slot);
        let expected = match block.state {
            BlockState::Free => return self.check_free(slot, block),
            BlockState::Writing | BlockState::Quarantined => SlotState::Writing,
            BlockState::Ready => SlotState::Ready,
        };
        ensure(!block.blocked, || format!("{slot:?} is still marked"))?;
        let held = self.held.contains(&slot);
        ensure(word == block.word && (held || word.state() == Ok(expected)), || {
            format!("{slot:?} is {:?} with {:?}, the table has {word:?}", block.state, block.word)
        })
    }

    fn check_free(&self, slot: SlotId, block: &Block) -> Result<(), String> {
        let word = self.table.word(slot);
        let clean = block.pins == 0 && !block.child.is_some() && !block.parent.is_some() && !block.blocked;
        ensure(clean && word.state() == Ok(SlotState::Free), || format!("{slot:?} is Free with {word:?}: {block:?}"))
    }

    fn check_chain(&self, slot: SlotId) -> Result<(), String> {
        let block = &self.blocks.hot[slot];
        let resident = matches!(block.state, BlockState::Ready | BlockState::Writing);
        if !resident {
            let alone = !block.parent.is_some() && !block.child.is_some();
            return ensure(alone, || format!("{slot:?} is {:?} in a chain", block.state));
        }
        let (mut child, mut prev) = (block.child, SlotId::NONE);
        while child.is_some() {
            let (below, links) = (&self.blocks.hot[child], &self.blocks.links[child]);
            ensure(below.parent == slot && links.prev == prev, || format!("{child:?} hangs wrongly on {slot:?}"))?;
            (prev, child) = (child, links.next);
        }
        if !block.parent.is_some() {
            return Ok(());
        }
        let parent = &self.blocks.hot[block.parent];
        let same = (parent.namespace, parent.group) == (block.namespace, block.group);
        let whole = matches!(parent.state, BlockState::Ready | BlockState::Writing);
        ensure(same && whole && parent.position + 1 == block.position && self.is_child(slot), || {
            format!("{slot:?} ({block:?}) hangs on {parent:?}")
        })
    }

    fn is_child(&self, slot: SlotId) -> bool {
        let parent = self.blocks.hot[slot].parent;
        let prev = self.blocks.links[slot].prev;
        if prev.is_some() { self.blocks.links[prev].next == slot } else { self.blocks.hot[parent].child == slot }
    }

    fn check_index(&self, slots: &[SlotId]) -> Result<(), String> {
        let mut resident = 0;
        for &slot in slots {
            let block = &self.blocks.hot[slot];
            if matches!(block.state, BlockState::Ready | BlockState::Writing) {
                resident += 1;
                let hash = index::hash(block.namespace, block.group, &block.key);
                let found = self.index.find(&self.blocks.hot, hash, block.namespace, block.group, &block.key);
                ensure(found == Some(slot), || format!("the index has {found:?} for {slot:?}"))?;
            }
        }
        ensure(self.index.len() == resident, || format!("the index has {} of {resident} blocks", self.index.len()))
    }

    fn check_counts(&self, slots: &[SlotId]) -> Result<(), String> {
        let mut states = ByState::default();
        let mut by_namespace: BTreeMap<NamespaceId, u64> = BTreeMap::new();
        let mut by_chunk: BTreeMap<ChunkId, u32> = BTreeMap::new();
        for &slot in slots {
            let block = &self.blocks.hot[slot];
            if block.state == BlockState::Free {
                continue;
            }
            *states.of(block.state) += 1;
            *by_namespace.entry(block.namespace).or_default() += 1;
            *by_chunk.entry(ChunkId(slot.0 >> self.chunk_shift)).or_default() += 1;
        }
        ensure(states == self.blocks_by_state, || format!("{states:?}, counted {:?}", self.blocks_by_state))?;
        for (id, namespace) in self.namespaces.iter().enumerate() {
            let found = by_namespace.get(&NamespaceId(id as u16)).copied().unwrap_or(0);
            let counted = namespace.as_ref().map_or(0, |namespace| namespace.slots);
            ensure(counted == found, || format!("namespace {id} has {found} slots, counted {counted}"))?;
        }
        for (id, chunk) in self.chunks.all.iter().enumerate().filter(|(_, chunk)| chunk.state.has_slots()) {
            let found = by_chunk.get(&ChunkId(id as u32)).copied().unwrap_or(0);
            ensure(chunk.used == found, || format!("chunk {id} uses {found} slots, counted {}", chunk.used))?;
        }
        Ok(())
    }

    fn check_pins(&self, slots: &[SlotId]) -> Result<(), String> {
        let mut pins: BTreeMap<SlotId, u32> = BTreeMap::new();
        let held = self.reads.values().flat_map(|lease| &lease.pins);
        for slot in held.chain(self.writes.values().filter_map(|lease| lease.guard.as_ref())) {
            *pins.entry(*slot).or_default() += 1;
        }
        for &slot in slots {
            let (block, expected) = (&self.blocks.hot[slot], pins.remove(&slot).unwrap_or(0));
            let right = block.pins == expected && (expected == 0 || block.state == BlockState::Ready);
            ensure(right, || format!("{slot:?} is {:?} with {} pins, not {expected}", block.state, block.pins))?;
        }
        ensure(pins.is_empty(), || format!("pins on slots that are not there: {pins:?}"))?;
        let total: u64 = slots.iter().map(|slot| u64::from(self.blocks.hot[*slot].pins)).sum();
        ensure(total == self.counters.pins, || format!("{total} pins, counted {}", self.counters.pins))
    }

    fn check_writes(&self, slots: &[SlotId]) -> Result<(), String> {
        let mut held: BTreeSet<SlotId> = self.held.iter().copied().collect();
        for (id, lease) in &self.writes {
            let left = lease.slots.iter().filter(|slot| slot.is_some()).count();
            ensure(left == lease.left as usize, || format!("{id:?} has {left} slots, counted {}", lease.left))?;
            ensure(left > 0 || lease.building, || format!("{id:?} is done and still there"))?;
            for (place, slot) in lease.slots.iter().enumerate() {
                ensure(slot.is_some() == lease.is_open(place), || format!("{id:?} keeps {slot:?} wrongly"))?;
                if slot.is_some() {
                    ensure(self.blocks.links[*slot].place as usize == place, || format!("{slot:?} is misplaced"))?;
                    ensure(held.insert(*slot), || format!("{slot:?} is held twice"))?;
                }
            }
        }
        for &slot in slots {
            let state = self.blocks.hot[slot].state;
            let writing = matches!(state, BlockState::Writing | BlockState::Quarantined);
            ensure(writing == held.remove(&slot), || format!("{slot:?} is {state:?}, held the other way"))?;
        }
        ensure(held.is_empty(), || format!("held slots that are not there: {held:?}"))
    }

    fn check_engines(&self) -> Result<(), String> {
        let mut found: BTreeMap<EngineToken, Engine> = BTreeMap::new();
        for lease in self.reads.values() {
            found.entry(lease.engine).or_default().pinned += lease.pages;
        }
        for lease in self.writes.values() {
            found.entry(lease.engine).or_default().writing += u64::from(lease.left) * u64::from(lease.pages);
        }
        for (id, engine) in &self.engines {
            let holds = found.remove(id).unwrap_or_default();
            let same = (holds.pinned, holds.writing) == (engine.pinned, engine.writing);
            ensure(same, || format!("{id:?} holds {holds:?}, counted {engine:?}"))?;
            let within = holds.pinned <= self.cap_pages && holds.writing <= self.cap_pages;
            ensure(within, || format!("{id:?} is over its cap of {} pages: {holds:?}", self.cap_pages))?;
        }
        ensure(found.is_empty(), || format!("leases of engines that are gone: {:?}", found.keys()))
    }

    fn check_policy(&self, id: usize) -> Result<(), String> {
        let chunks = self.chunks_of(id);
        let class = &self.classes[id];
        ensure(class.chunks as usize == chunks.len(), || {
            format!("size {id} has {chunks:?}, counted {}", class.chunks)
        })?;
        let slots = chunks.into_iter().flat_map(|chunk| self.blocks.hot.slots_in(chunk));
        let resident = |slot: &SlotId| matches!(self.blocks.hot[*slot].state, BlockState::Ready | BlockState::Writing);
        let tracked: Vec<SlotId> = slots.filter(resident).collect();
        class.policy.validate(&tracked, &|slot| evictable(&self.blocks.hot, slot))
    }
}
