//! Least recently used, the tail of a chain first.
//!
//! A hit touches its last block only: a block's time is the latest of its own and of all that hung on
//! it. One list in the order of own times holds every block that may be a leaf; [`Lru::coldest`] takes
//! out what is not evictable when it meets it, and it comes back where its time belongs when it is
//! evictable again. A block met at the cold end is colder than the whole list, so both are O(1)
//! amortised, and the order is exact: by touch, finer than the clock's ticks.

use crate::clock::Ticks;
use crate::geometry::Geometry;
use crate::ids::{ChunkId, SlotId};
use crate::per_slot::PerSlot;

use super::{EvictionPolicy, Victim};

/// End of the list. No slot has this number.
const END: SlotId = SlotId::NONE;
/// In `next` of a block that is not in the list. No slot has it: slot numbers end below `u32::MAX - 1`.
const OUT: SlotId = SlotId(u32::MAX - 1);
/// Bits of a stamp below the ticks: they order the touches of one tick.
const TICK_SHIFT: u32 = 32;

#[derive(Clone, Debug)]
struct Node {
    /// Towards the cold end.
    prev: SlotId,
    /// Towards the hot end.
    next: SlotId,
    /// Ticks of the last use and, below, the order within the tick; no two resident blocks have the
    /// same unless one inherited it from the other. 0 = not tracked.
    stamp: u64,
}

const UNTRACKED: Node = Node { prev: OUT, next: OUT, stamp: 0 };

/// See the module.
#[derive(Debug)]
pub struct Lru {
    nodes: PerSlot<Node>,
    cold: SlotId,
    hot: SlotId,
    /// The last stamp given.
    clock: u64,
}

impl Lru {
    /// An LRU with no chunks.
    #[must_use]
    pub fn new(geometry: &Geometry) -> Self {
        Self { nodes: PerSlot::new(geometry), cold: END, hot: END, clock: 0 }
    }

    fn stamp(&mut self, now: Ticks) -> u64 {
        self.clock = (self.clock + 1).max(now.0 << TICK_SHIFT);
        self.clock
    }

    fn linked(&self, slot: SlotId) -> bool {
        self.nodes[slot].next != OUT
    }

    fn unlink(&mut self, slot: SlotId) {
        let Node { prev, next, .. } = self.nodes[slot];
        if next == OUT {
            return;
        }
        self.set_next(prev, next);
        self.set_prev(next, prev);
        let node = &mut self.nodes[slot];
        (node.prev, node.next) = (OUT, OUT);
    }

    /// Links `slot` on the cold side of `next` (`END` = the hot end).
    fn link_before(&mut self, slot: SlotId, next: SlotId) {
        let prev = if next == END { self.hot } else { self.nodes[next].prev };
        let node = &mut self.nodes[slot];
        (node.prev, node.next) = (prev, next);
        self.set_next(prev, slot);
        self.set_prev(next, slot);
    }

    fn set_next(&mut self, slot: SlotId, next: SlotId) {
        if slot == END {
            self.cold = next;
        } else {
            self.nodes[slot].next = next;
        }
    }

    fn set_prev(&mut self, slot: SlotId, prev: SlotId) {
        if slot == END {
            self.hot = prev;
        } else {
            self.nodes[slot].prev = prev;
        }
    }

    /// Links `slot` where its stamp belongs. Whatever left the list left it at the cold end, so only
    /// others that left and came back lie before it.
    fn link_from_cold(&mut self, slot: SlotId) {
        let stamp = self.nodes[slot].stamp;
        let mut next = self.cold;
        while next != END && self.nodes[next].stamp < stamp {
            next = self.nodes[next].next;
        }
        self.link_before(slot, next);
    }

    /// `heir` is at least as hot as `slot` was, and stands in its place if it was colder.
    fn inherit(&mut self, slot: SlotId, heir: SlotId) {
        let stamp = self.nodes[slot].stamp;
        if self.nodes[heir].stamp >= stamp {
            return;
        }
        self.unlink(heir);
        self.nodes[heir].stamp = stamp;
        if self.linked(slot) {
            self.link_before(heir, slot);
        }
    }

    fn hottest(&mut self, slot: SlotId, now: Ticks) {
        self.unlink(slot);
        self.nodes[slot].stamp = self.stamp(now);
        self.link_before(slot, END);
    }

    fn check_order(&self) -> Result<Vec<SlotId>, String> {
        let (mut listed, mut prev, mut at) = (Vec::new(), END, self.cold);
        while at != END {
            let node = &self.nodes[at];
            if node.prev != prev {
                return Err(format!("lru: {at:?} points back to {:?}, not {prev:?}", node.prev));
            }
            if prev != END && self.nodes[prev].stamp > node.stamp {
                return Err(format!("lru: {prev:?} is hotter than {at:?} behind it"));
            }
            listed.push(at);
            (prev, at) = (at, node.next);
        }
        if self.hot != prev {
            return Err(format!("lru: the hot end is {:?}, not {prev:?}", self.hot));
        }
        Ok(listed)
    }
}

impl EvictionPolicy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn add_chunk(&mut self, chunk: ChunkId, slots: u32) {
        self.nodes.add_chunk(chunk, slots, UNTRACKED);
    }

    fn remove_chunk(&mut self, chunk: ChunkId) {
        self.nodes.remove_chunk(chunk);
    }

    fn insert(&mut self, slot: SlotId, now: Ticks) {
        let stamp = self.stamp(now);
        let prev = std::mem::replace(&mut self.hot, slot);
        self.nodes[slot] = Node { prev, next: END, stamp };
        self.set_next(prev, slot);
    }

    fn touch(&mut self, slot: SlotId, now: Ticks) {
        self.hottest(slot, now);
    }

    fn remove(&mut self, slot: SlotId, heir: Option<SlotId>) {
        if let Some(heir) = heir {
            self.inherit(slot, heir);
        }
        self.unlink(slot);
        self.nodes[slot] = UNTRACKED;
    }

    fn evictable(&mut self, slot: SlotId) {
        if !self.linked(slot) {
            self.link_from_cold(slot);
        }
    }

    fn coldest(&mut self, evictable: &dyn Fn(SlotId) -> bool) -> Option<Victim> {
        while self.cold != END {
            let slot = self.cold;
            if evictable(slot) {
                return Some(Victim { slot, last_use: Ticks(self.nodes[slot].stamp >> TICK_SHIFT) });
            }
            self.unlink(slot);
        }
        None
    }

    fn validate(&self, tracked: &[SlotId], evictable: &dyn Fn(SlotId) -> bool) -> Result<(), String> {
        let listed = self.check_order()?;
        for &slot in tracked {
            if self.nodes[slot].stamp == 0 {
                return Err(format!("lru: {slot:?} is resident and not tracked"));
            }
            if evictable(slot) && !self.linked(slot) {
                return Err(format!("lru: {slot:?} is evictable and not in the list"));
            }
        }
        let known: std::collections::HashSet<_> = tracked.iter().collect();
        match listed.iter().find(|slot| !known.contains(slot)) {
            Some(slot) => Err(format!("lru: {slot:?} is in the list and not resident")),
            None => Ok(()),
        }
    }
}
