//! kvmp's blocking client: bounded waits, late replies given back, the slot-word check.
//!
//! Life of a session: *connect* ([`Client::connect`]) -> *open* or *join* namespaces -> requests -> *close*.
//! Life of a request: submitted -> answered -> taken; or given up (its bound passed, its owner dropped it): then the
//! reply that comes late is settled, which ends the lease it granted, and only then its scratch range is free again.
//!
//! A session is *lost* after a missed bound until a ping is answered, and for good after a hang-up. While it is lost no
//! call waits and none submits.

mod arena;
mod bound;
mod client;
mod connect;
mod control;
pub mod copy;
mod endpoint;
mod error;
mod fork;
mod holder;
mod lease;
mod listed;
mod lookup;
mod namespace;
mod parts;
mod prefault;
mod request;
mod reserve;
mod scratch;
mod session;
mod slots;
mod stats;
mod sums;

pub use arena::KeptArena;
pub use bound::Bound;
pub use client::Client;
pub use connect::ConnectOptions;
pub use endpoint::Endpoint;
pub use error::{ClientError, LostWhy};
pub use holder::CopyGuard;
pub use lease::{GroupRun, ReadLease, WriteLease};
pub use listed::ListedNamespace;
pub use lookup::PendingLookup;
pub use namespace::Namespace;
pub use reserve::{PendingReserve, ReserveList};
pub use slots::PartsAt;
pub use sums::PartCheck;
