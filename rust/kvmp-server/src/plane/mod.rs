//! The data-plane thread: the one owner of the block store.
//!
//! Sessions reach it through their rings, the control and the backing thread through a channel. It works
//! in slices of at most 1,024 keys, round robin over sessions, and makes no call that a client can block.

mod attach;
mod clock;
mod command;
mod engines;
mod namespaces;
mod run;
mod serve;
mod session;
mod stats;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use command::Reply;
pub(crate) use command::{Attach, Command, Faults, PlaneHandle, Refused, SessionId, refused};
pub(crate) use namespaces::Namespaces;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use namespaces::hex;
pub(crate) use run::{Plane, PlaneStart};
