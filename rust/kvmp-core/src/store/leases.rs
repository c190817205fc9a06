//! Leases and the engines that hold them.
//!
//! A read lease is pins; it ends by release, by its TTL or with its engine. A write lease is slots with
//! open parts; it ends when the last part of the last slot is closed, and no TTL closes a part.

use crate::clock::Ticks;
use crate::ids::{EngineToken, LeaseId, NamespaceId, PartId, SlotId};
use crate::slot::PartSum;

use super::BlockStore;
use super::blocks::BlockState;
use super::table::SlotTable;

/// What an engine holds, in 4 KiB pages; each is capped at half the arena.
#[derive(Debug, Default)]
pub(super) struct Engine {
    /// Kept from eviction by its read leases: each run in full, also where runs share blocks.
    pub pinned: u64,
    /// Its slots that are Writing or Quarantined.
    pub writing: u64,
}

/// Pins on the blocks that protect what a lookup found.
#[derive(Debug)]
pub(super) struct ReadLease {
    pub engine: EngineToken,
    pub pins: Vec<SlotId>,
    /// What these pins count in [`Engine::pinned`].
    pub pages: u64,
    pub expires: Ticks,
}

/// Slots granted by one reservation.
#[derive(Debug)]
pub(super) struct WriteLease {
    pub engine: EngineToken,
    /// Namespace of its blocks.
    pub namespace: NamespaceId,
    /// Pages of a slot.
    pub pages: u32,
    pub parts: u16,
    /// In the order of the grants; `NONE` once all parts of a slot are closed.
    pub slots: Vec<SlotId>,
    /// A bit for each open part, [`Self::stride`] words a slot.
    pub open: Vec<u64>,
    /// Sums of committed parts, `parts` a slot; empty until the first commit.
    pub sums: Vec<PartSum>,
    /// Slots that are not `NONE`.
    pub left: u32,
    /// The Ready block that this reservation extends, pinned while it goes on.
    pub guard: Option<SlotId>,
    /// The reservation may still grant.
    pub building: bool,
}

impl WriteLease {
    pub fn new(engine: EngineToken, namespace: NamespaceId, pages: u32, parts: u16) -> Self {
        Self {
            engine,
            namespace,
            pages,
            parts,
            slots: Vec::new(),
            open: Vec::new(),
            sums: Vec::new(),
            left: 0,
            guard: None,
            building: true,
        }
    }

    fn stride(&self) -> usize {
        usize::from(self.parts).div_ceil(64)
    }

    /// Adds a slot with every part open; returns its place.
    pub fn push(&mut self, slot: SlotId) -> u32 {
        self.slots.push(slot);
        self.left += 1;
        for first in (0..self.parts).step_by(64) {
            let bits = u32::from((self.parts - first).min(64));
            self.open.push(u64::MAX >> (64 - bits));
        }
        (self.slots.len() - 1) as u32
    }

    /// Closes a part of a slot; false if it was closed before.
    pub fn close(&mut self, place: usize, part: PartId) -> bool {
        let word = place * self.stride() + usize::from(part.0 / 64);
        let bit = 1 << (part.0 % 64);
        let was_open = self.open[word] & bit != 0;
        self.open[word] &= !bit;
        was_open
    }

    /// Whether any part of a slot is open.
    pub fn is_open(&self, place: usize) -> bool {
        let stride = self.stride();
        self.open[place * stride..(place + 1) * stride].iter().any(|&bits| bits != 0)
    }

    /// Open parts of a slot.
    pub fn open_parts(&self, place: usize) -> Vec<PartId> {
        let stride = self.stride();
        let is_open = |part: &u16| self.open[place * stride + usize::from(part / 64)] & (1 << (part % 64)) != 0;
        (0..self.parts).filter(is_open).map(PartId).collect()
    }

    /// Keeps what a part's writer said of it.
    pub fn note(&mut self, place: usize, part: PartId, sum: PartSum) {
        let parts = usize::from(self.parts);
        let needed = self.slots.len() * parts;
        if self.sums.len() < needed {
            self.sums.resize(needed, PartSum::default());
        }
        self.sums[place * parts + usize::from(part.0)] = sum;
    }

    /// Sums of all parts of a slot.
    pub fn sums_of(&self, place: usize) -> &[PartSum] {
        let parts = usize::from(self.parts);
        &self.sums[place * parts..(place + 1) * parts]
    }
}

impl<T: SlotTable> BlockStore<T> {
    pub(super) fn new_lease(&mut self) -> LeaseId {
        self.last_lease += 1;
        LeaseId(self.last_lease)
    }

    pub(super) fn engine(&mut self, engine: EngineToken) -> &mut Engine {
        self.engines.entry(engine).or_default()
    }

    pub(super) fn pin(&mut self, slot: SlotId) {
        self.blocks.hot[slot].pins += 1;
        self.counters.pins += 1;
    }

    pub(super) fn unpin(&mut self, slot: SlotId) {
        let block = &mut self.blocks.hot[slot];
        debug_assert!(block.state == BlockState::Ready && block.pins > 0, "unpinned {slot:?}: {block:?}");
        block.pins -= 1;
        self.counters.pins -= 1;
        if block.pins == 0 {
            self.maybe_evictable(slot);
            self.wake_drain();
        }
    }

    /// Makes `pins` the pins of a read lease, or ends it if the engine would be over its cap.
    /// Returns whether they are pinned.
    pub(super) fn move_pins(&mut self, lease: LeaseId, pins: Vec<SlotId>, pages: u64) -> bool {
        let cap = self.cap_pages;
        let Some(entry) = self.reads.get_mut(&lease) else { return false };
        let engine = self.engines.entry(entry.engine).or_default();
        if engine.pinned - entry.pages + pages > cap {
            self.end_read(lease);
            return false;
        }
        engine.pinned = engine.pinned - entry.pages + pages;
        entry.pages = pages;
        // New before old: they may be the same block.
        let old = std::mem::replace(&mut entry.pins, pins.clone());
        pins.into_iter().for_each(|slot| self.pin(slot));
        old.into_iter().for_each(|slot| self.unpin(slot));
        true
    }

    /// Ends a read lease, if it is there.
    pub(super) fn end_read(&mut self, lease: LeaseId) {
        if let Some(ReadLease { engine, pins, pages, .. }) = self.reads.remove(&lease) {
            self.engine(engine).pinned -= pages;
            pins.into_iter().for_each(|slot| self.unpin(slot));
        }
    }

    /// Ends a read lease of this engine; false (and counted) if the engine has no such lease (any more).
    pub fn release(&mut self, engine: EngineToken, lease: LeaseId) -> bool {
        let owned = self.reads.get(&lease).is_some_and(|entry| entry.engine == engine);
        if owned {
            self.end_read(lease);
        } else {
            self.counters.refused_releases += 1;
        }
        owned
    }

    /// Ends the read leases whose TTL has passed; returns how many.
    pub fn expire(&mut self, now: Ticks) -> u32 {
        let mut count = 0;
        // Leases are made in the order of their ids and all have the same TTL.
        while let Some((&lease, _)) = self.reads.first_key_value().filter(|(_, entry)| entry.expires <= now) {
            self.end_read(lease);
            count += 1;
        }
        count
    }

    /// Makes `slot` the block that the reservation extends, and keeps it from eviction.
    pub(super) fn guard(&mut self, lease: LeaseId, slot: Option<SlotId>) {
        let Some(entry) = self.writes.get_mut(&lease) else { return };
        let old = std::mem::replace(&mut entry.guard, slot);
        slot.into_iter().for_each(|slot| self.pin(slot));
        old.into_iter().for_each(|slot| self.unpin(slot));
    }

    /// A Ready block goes with a Writing one it hung on: no reservation extends it any more, and no read lease keeps
    /// it. (A lookup stops at a Writing block, but a long list's next piece begins behind it.)
    pub(super) fn drop_all_pins(&mut self, slot: SlotId) {
        let mut dropped = 0;
        for entry in self.writes.values_mut().filter(|entry| entry.guard == Some(slot)) {
            entry.guard = None;
            dropped += 1;
        }
        for lease in self.reads.values_mut() {
            let before = lease.pins.len();
            lease.pins.retain(|pinned| *pinned != slot);
            dropped += before - lease.pins.len();
        }
        self.blocks.hot[slot].pins -= dropped as u32;
        self.counters.pins -= dropped as u64;
    }

    /// Removes a write lease that holds nothing and cannot get anything any more.
    pub(super) fn drop_if_done(&mut self, lease: LeaseId) {
        let done = self.writes.get(&lease).is_some_and(|entry| entry.left == 0 && !entry.building);
        if done {
            self.guard(lease, None);
            self.writes.remove(&lease);
        }
    }
}
