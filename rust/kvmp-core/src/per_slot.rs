//! One value a slot, in memory only while the slot's chunk is assigned.

use std::ops::{Index, IndexMut};

use crate::geometry::Geometry;
use crate::ids::{ChunkId, SlotId};
use crate::memory::with_memory;

/// Values by slot number, allocated a chunk at a time: an arena costs what its assigned chunks cost.
#[derive(Debug)]
pub struct PerSlot<V> {
    /// log2 of the slot numbers a chunk has.
    shift: u32,
    /// The bits of a slot number that are its index in its chunk.
    mask: u32,
    chunks: Vec<Box<[V]>>,
}

impl<V: Clone> PerSlot<V> {
    /// Room for every chunk of `geometry`, none allocated.
    #[must_use]
    pub fn new(geometry: &Geometry) -> Self {
        let chunks = (0..geometry.chunks).map(|_| Box::default()).collect();
        let pages = geometry.chunk_pages();
        Self { shift: pages.ilog2(), mask: pages - 1, chunks }
    }

    /// Allocates `slots` copies of `value` for a chunk.
    pub fn add_chunk(&mut self, chunk: ChunkId, slots: u32, value: V) {
        let mut values = with_memory(slots as usize);
        values.resize(slots as usize, value);
        self.chunks[chunk.0 as usize] = values.into_boxed_slice();
    }
}

impl<V> PerSlot<V> {
    /// Gives a chunk's memory back.
    pub fn remove_chunk(&mut self, chunk: ChunkId) {
        self.chunks[chunk.0 as usize] = Box::default();
    }

    /// How many slots a chunk has; 0 unless it was added.
    #[must_use]
    pub fn slots_of(&self, chunk: ChunkId) -> u32 {
        self.chunks.get(chunk.0 as usize).map_or(0, |c| c.len() as u32)
    }

    #[inline]
    fn place(&self, slot: SlotId) -> (usize, usize) {
        // `wrapping` only leaves out the check that the shift is under 32.
        (slot.0.wrapping_shr(self.shift) as usize, (slot.0 & self.mask) as usize)
    }

    /// Value of a slot, `None` where no assigned chunk has it: for numbers that a client sent.
    #[must_use]
    pub fn get(&self, slot: SlotId) -> Option<&V> {
        let (chunk, index) = self.place(slot);
        self.chunks.get(chunk)?.get(index)
    }

    /// Slots of a chunk, in order.
    pub fn slots_in(&self, chunk: ChunkId) -> impl DoubleEndedIterator<Item = SlotId> + use<V> {
        let first = chunk.0 << self.shift;
        (0..self.slots_of(chunk)).map(move |i| SlotId(first + i))
    }
}

impl<V> Index<SlotId> for PerSlot<V> {
    type Output = V;

    #[inline]
    fn index(&self, slot: SlotId) -> &V {
        let (chunk, index) = self.place(slot);
        &self.chunks[chunk][index]
    }
}

impl<V> IndexMut<SlotId> for PerSlot<V> {
    #[inline]
    fn index_mut(&mut self, slot: SlotId) -> &mut V {
        let (chunk, index) = self.place(slot);
        &mut self.chunks[chunk][index]
    }
}
