//! Copies between an engine's paged KV memory on a GPU and slots of the arena.
//!
//! The arena is host memory that the client maps; [`Registration`] makes it known to CUDA in the background, piece by
//! piece. [`Lanes`] copies on two streams of its own, one a direction, ordered behind an event of the engine's stream and
//! never waiting for that stream on the host. A [`Transfer`] is a copy under way: it keeps the holder entry locked and the
//! memory mapped until its event has completed, so a commit, an abort or the end of a lease comes after the last byte.
//!
//! CUDA's driver is loaded when the first [`Device`] is opened; on a machine without one that is an error, no more.
//! Kept out of here: leases, words, parts (kvmp-client), and which blocks go where (the connector).

mod batch;
mod bell;
mod device;
mod end;
mod error;
mod gather;
mod lanes;
mod plan;
mod registration;
mod stream;
mod transfer;

pub use bell::Bell;
pub use device::Device;
pub use error::CudaError;
pub use lanes::{Direction, Lanes, Order, Way};
pub use plan::DeviceLayout;
pub use registration::{Registered, Registration};
pub use transfer::Transfer;
