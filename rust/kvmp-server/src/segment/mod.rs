//! The segment from the server's side: its file, the locks on it, the memory behind it.

pub mod backing;
mod file;
mod locks;
mod place;
mod table;

pub use file::{Claim, Found, SegmentFile, boot_clock_ns, kept_arena_bytes, remove};
pub use locks::HolderLocks;
#[cfg(any(test, feature = "fuzz"))]
pub use place::segment_path;
pub use table::SegmentTable;
