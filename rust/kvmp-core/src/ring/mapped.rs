//! A ring in mapped memory.
//!
//! Offsets: control page (positions and parked word, each on a cache line of its own), submissions,
//! completions, scratch.

use crate::ring::queue::QueueCells;
use crate::segment::Mapping;
use crate::sync::{AtomicU32, AtomicU64};

/// Entries of each queue.
pub const RING_ENTRIES: u64 = 1024;
/// Bytes of the scratch area.
pub const SCRATCH_BYTES: u64 = 8 << 20;
const CONTROL: u64 = 4096;
const QUEUE_BYTES: u64 = RING_ENTRIES * 64;
/// Offset of the scratch area.
pub const SCRATCH_OFFSET: u64 = CONTROL + 2 * QUEUE_BYTES;
const CLIENT_PARKED: u64 = 256;

/// Which of the two queues.
#[derive(Clone, Copy, Debug)]
pub struct QueuePlace {
    tail: u64,
    head: u64,
    entries: u64,
}

/// Client to server.
pub const SUBMISSIONS: QueuePlace = QueuePlace { tail: 0, head: 64, entries: CONTROL };
/// Server to client.
pub const COMPLETIONS: QueuePlace = QueuePlace { tail: 128, head: 192, entries: CONTROL + QUEUE_BYTES };

/// One queue of a mapped ring.
#[derive(Clone, Debug)]
pub struct MappedQueue {
    map: Mapping,
    place: QueuePlace,
}

impl QueueCells for MappedQueue {
    fn tail(&self) -> &AtomicU64 {
        self.map.u64_at(self.place.tail)
    }
    fn head(&self) -> &AtomicU64 {
        self.map.u64_at(self.place.head)
    }
    fn entry(&self, index: u64) -> &[AtomicU64; 8] {
        self.map.u64s_at(self.place.entries + index % RING_ENTRIES * 64)
    }
    fn capacity(&self) -> u64 {
        RING_ENTRIES
    }
}

/// A mapped ring: both queues, the client's parked word, the scratch area.
#[derive(Clone, Debug)]
pub struct Ring {
    map: Mapping,
}

impl Ring {
    /// Bytes of a ring's memfd.
    pub const BYTES: u64 = SCRATCH_OFFSET + SCRATCH_BYTES;

    /// Wraps a mapping of [`Ring::BYTES`]; panics when it is shorter.
    #[must_use]
    pub fn new(map: Mapping) -> Self {
        assert!(map.len() as u64 >= Self::BYTES, "the ring's mapping is too short");
        Self { map }
    }

    /// One of the queues.
    #[must_use]
    pub fn queue(&self, place: QueuePlace) -> MappedQueue {
        MappedQueue { map: self.map.clone(), place }
    }

    /// Set while the client sleeps or is about to.
    #[must_use]
    pub fn client_parked(&self) -> &AtomicU32 {
        self.map.u32_at(CLIENT_PARKED)
    }

    /// The word the client sleeps on: the low half of the completion tail.
    #[must_use]
    pub fn completion_futex(&self) -> &AtomicU32 {
        let offset = if cfg!(target_endian = "little") { 0 } else { 4 };
        self.map.u32_at(COMPLETIONS.tail + offset)
    }

    /// Whether a scratch range lies within the scratch area.
    #[must_use]
    pub fn in_scratch(offset: u32, len: u32) -> bool {
        u64::from(offset) + u64::from(len) <= SCRATCH_BYTES
    }

    /// Copies out of the scratch area; panics outside it.
    pub fn read_scratch(&self, offset: u32, into: &mut [u8]) {
        self.map.read(SCRATCH_OFFSET + u64::from(offset), into);
    }

    /// Copies into the scratch area; panics outside it.
    pub fn write_scratch(&self, offset: u32, from: &[u8]) {
        self.map.write(SCRATCH_OFFSET + u64::from(offset), from);
    }
}
