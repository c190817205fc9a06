//! kvmp's shared shapes: segment, rings, slots, block store, policies, wire types.
//!
//! No tokio, no PyO3. `unsafe` only where shared bytes are touched.

pub mod clock;
pub mod geometry;
pub mod ids;
mod memory;
pub mod namespace;
pub mod per_slot;
pub mod policy;
pub mod ring;
pub mod segment;
pub mod slot;
pub mod store;
pub mod sync;
#[cfg(not(loom))]
pub mod wire;
