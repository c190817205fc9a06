//! Copies between an engine's paged KV memory (CPU) and slots of the arena.
//!
//! Life of a copy: *describe* ([`BlockLayout`], once) -> *check* (every bound, before the first byte) -> *move*
//! (pieces of 1 MiB, taken by as many threads as help) -> *end* (all threads joined, streamed bytes drained).
//!
//! Order against the slot word. [`store`] fences (Release) before its first byte, so no byte goes out ahead of
//! what the grant's reply was seen to say; it returns once every byte is globally visible, so a commit sent after
//! it covers them. [`load`] fences nothing: the client's word check does, after the copy (`fence(Acquire)`, load
//! the word, compare), and bytes loaded are garbage until that check has passed.
//!
//! The arena is written by other processes, so it is touched through raw pointers only. Kept out of here: leases,
//! slots, parts. The client turns a slot and a part into an offset in the arena.

mod bytes;
mod check;
mod disjoint;
mod error;
mod layout;
mod populate;
mod threads;
mod transfer;

pub use check::{ArenaView, check_load, check_store};
pub use error::CopyError;
pub use layout::{BlockLayout, Run};
pub use populate::{Populated, Touch, populate};
pub use transfer::{load, store};
