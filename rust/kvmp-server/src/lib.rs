//! kvmp's server, to run as `kvmp serve` or to embed in a Rust program.
//!
//! ```no_run
//! let server = kvmp_server::Server::builder().size(1 << 30).name("mine").ephemeral(true).start()?;
//! println!("engines connect to {}", server.endpoint());
//! server.stop();
//! # Ok::<(), kvmp_server::ServerError>(())
//! ```

#[cfg(not(target_os = "linux"))]
compile_error!("kvmp runs on Linux only: it needs tmpfs, memfd, futex and OFD locks");

mod builder;
pub mod cli;
mod config;
mod error;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
#[allow(clippy::unwrap_used, missing_docs, reason = "tests, in a form that a fuzzer can run")]
pub mod fuzz;
mod growth;
// Beside the other tests that kill, but of this crate: it runs store and recovery, which are not public.
#[cfg(test)]
#[path = "../tests/kill_anywhere/mod.rs"]
mod kill_anywhere;
mod limits;
mod listen;
mod plane;
mod process;
mod recovery;
mod segment;
mod server;
mod size;
mod span;
mod upgrade;

pub use builder::ServerBuilder;
pub use config::{ConfigSource, DEFAULT_ARENA_DIR, DEFAULT_NAME, ServerConfig, Upgrade, default_socket};
pub use error::{Holder, ServerError};
pub use limits::{Bound as MemoryBound, memory_bounds};
pub use process::WatchedProcess;
pub use segment::{kept_arena_bytes, lies_in_memory};
pub use server::Server;
pub use size::{Bytes, SizeError, parse_size};
