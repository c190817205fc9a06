//! Bodies of the fuzz targets: each takes any bytes and panics if the server does what it must never do.
//!
//! `cargo fuzz` runs them from the workspace under `fuzz/`; the tests here replay `fuzz/corpus` without it.

mod bytes;
mod config;
mod handshake;
#[cfg(test)]
mod replay;
mod ring;
mod segment;
mod stage;

pub use config::config;
pub use handshake::{Door, handshake};
pub use ring::{Seen, ring};
pub use segment::{Quarry, segment};
