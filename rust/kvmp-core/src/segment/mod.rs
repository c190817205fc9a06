//! The segment: one named file, `header | chunk words | chunk records | chunks`.
//!
//! Sparse, made under a temporary name and renamed, never truncated or re-laid: another geometry,
//! layout version or boot id is a new inode, so that an old client goes on in a file consistent with itself.

mod header;
mod layout;
#[cfg(not(loom))]
mod mapping;
mod ofd;
mod record;
#[cfg(not(loom))]
mod table;

pub use header::{HeaderError, SegmentHeader, SegmentId, boot_id};
pub use layout::{
    HOLDER_ENTRY, HOLDERS, Layout, MAX_SPEC_BYTES, NAMESPACE_ENTRY, NAMESPACES, PARKED_OFFSET, holder_offset,
};
#[cfg(not(loom))]
pub use mapping::{Access, Mapping};
pub use ofd::{LockKind, first_locked, try_lock};
pub use record::{Record, RecordCells};
#[cfg(not(loom))]
pub use table::{ChunkWord, NamespaceEntry, TableMap};
