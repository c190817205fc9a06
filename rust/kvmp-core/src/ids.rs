//! The small names that every layer passes around, each a type of its own.

use std::fmt;

/// A block's key within its namespace and group: the engine's block hash, zero-padded to 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct BlockKey(pub [u8; 32]);

impl BlockKey {
    /// Bytes a key takes in a hash list.
    pub const BYTES: usize = 32;
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..6] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("..")
    }
}

/// Place of a slot in the segment: `chunk * (chunk bytes / 4 KiB) + index in the chunk`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct SlotId(pub u32);

impl SlotId {
    /// "No slot": the parent of a chain's first block.
    pub const NONE: Self = Self(u32::MAX);

    /// Whether this names a slot at all.
    #[must_use]
    pub fn is_some(self) -> bool {
        self != Self::NONE
    }
}

/// Index of a namespace in the header's table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct NamespaceId(pub u16);

/// Index of a KV-cache group in its namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct GroupId(pub u16);

/// Index of a part (what one rank writes of a slot) in its namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct PartId(pub u16);

/// Index of a chunk in the segment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct ChunkId(pub u32);

/// One engine (a scheduler and its workers), minted by the scheduler's Welcome.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct EngineToken(pub u64);

/// A read or a write lease; never reused within a server epoch, 0 is none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct LeaseId(pub u64);

/// One life of a server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct ServerEpoch(pub u64);
