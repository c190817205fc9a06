//! The ring: a session's submission and completion queue and its scratch area, in one sealed memfd.
//!
//! `free entry -> filled -> published (tail) -> taken (head) -> free entry`. Single producer, single
//! consumer; positions are 64 bits and never wrap in practice. Neither side trusts the other's position
//! beyond "at most `capacity` ahead".

mod doorbell;
#[cfg(not(loom))]
mod mapped;
mod queue;

pub use doorbell::Parking;
#[cfg(not(loom))]
pub use mapped::{COMPLETIONS, MappedQueue, RING_ENTRIES, Ring, SCRATCH_BYTES, SCRATCH_OFFSET, SUBMISSIONS};
pub use queue::{Consumer, Corrupt, Entry, Full, HeapQueue, Producer, QueueCells};
