//! The segment from the server's side: its file, the locks on it, the memory behind it.

pub mod backing;
mod file;
mod locks;
pub mod nodes;
mod place;
mod server_lock;
mod table;
mod whole;

pub use file::{Claim, FileState, Found, SegmentFile, boot_clock_ns, kept_arena_bytes, name_taken, remove};
pub use locks::HolderLocks;
pub use place::{lies_in_memory, segment_path};
pub use server_lock::{holds, named};
pub use table::SegmentTable;
