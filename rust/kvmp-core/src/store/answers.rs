//! What the store answers.

use crate::geometry::Geometry;
use crate::ids::{BlockKey, GroupId, LeaseId, NamespaceId, SlotId};
use crate::slot::SlotWord;

/// Why the store cannot take a namespace or a request at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A slot does not fit into a chunk.
    #[error(
        "a block of group {} takes {slot_bytes} bytes, more than a chunk of {chunk_bytes}; {}",
        group.0,
        larger_chunk(*.mend)
    )]
    SlotTooLarge {
        /// Group whose slot it is.
        group: GroupId,
        /// Bytes of the slot.
        slot_bytes: u64,
        /// Bytes of a chunk.
        chunk_bytes: u64,
        /// The least chunk size that would do, bytes; over 1 GiB there is none.
        mend: u64,
    },
    /// The namespace number is in use.
    #[error("namespace {} is already there", _0.0)]
    NamespaceExists(NamespaceId),
    /// The namespace is not there.
    #[error("there is no namespace {}; open it first", _0.0)]
    NoNamespace(NamespaceId),
    /// The namespace has slots.
    #[error("namespace {} still has {slots} slots", namespace.0)]
    NamespaceInUse {
        /// The namespace.
        namespace: NamespaceId,
        /// Slots that are not Free.
        slots: u64,
    },
    /// The namespace has no such group.
    #[error("namespace {} has {groups} groups, no group {}", namespace.0, group.0)]
    NoGroup {
        /// The namespace.
        namespace: NamespaceId,
        /// Group asked for.
        group: GroupId,
        /// Groups there are.
        groups: usize,
    },
    /// A prefix group's block needs the one before it, unless it is the first.
    #[error("a reservation from block {first_block} on names {parent:?} as the block before it")]
    Parent {
        /// Position of the first block asked for.
        first_block: u32,
        /// The block named as the one before it.
        parent: Option<BlockKey>,
    },
    /// A chunk to recover is not Cold, or its slot size cannot be.
    #[error("chunk {chunk} with slots of {pages} pages cannot be recovered into {geometry:?}")]
    Recover {
        /// The chunk.
        chunk: u32,
        /// 4 KiB pages of its slots.
        pages: u32,
        /// The store's geometry.
        geometry: Geometry,
    },
}

fn larger_chunk(bytes: u64) -> String {
    if bytes > crate::geometry::MAX_CHUNK {
        return "and a chunk (--chunk) has 1GiB at most: have the engine use smaller blocks".into();
    }
    format!("start the server with --chunk {bytes} and a --size of at least as much")
}

/// Fewer blocks may be evicted than were to go; none was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{asked} blocks were to be evicted, but only {found} are neither pinned nor being written")]
pub struct TooFewVictims {
    /// Blocks that were to go.
    pub asked: u64,
    /// Blocks that could.
    pub found: u64,
}

/// What a group's hit is made of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupHit {
    /// Position of the first block in `slots`.
    pub first_block: u32,
    /// The blocks one after the other.
    pub slots: Vec<(SlotId, SlotWord)>,
}

/// What a lookup found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupReply {
    /// Tokens that every group has, from the first one on.
    pub tokens: u32,
    /// Holds the pins; `None` without a hit or over the cap of pins.
    pub lease: Option<LeaseId>,
    /// In the order of the namespace's groups.
    pub groups: Vec<GroupHit>,
}

/// Answer to one key of a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReserveAnswer {
    /// Write it here.
    Granted(SlotId, SlotWord),
    /// It is Ready.
    Present,
    /// Someone is writing it.
    Pending,
    /// The block before it is neither Ready nor being written.
    NoParent,
    /// Nothing may be evicted for it, or the engine is over its cap.
    NoSpace,
    /// The policy would rather keep what it would cost.
    NotAdmitted,
    /// The arena is still growing; ask again later.
    Warming,
}

impl ReserveAnswer {
    /// The stable code on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Granted(..) => 0,
            Self::Present => 1,
            Self::Pending => 2,
            Self::NoParent => 3,
            Self::NoSpace => 4,
            Self::NotAdmitted => 5,
            Self::Warming => 6,
        }
    }
}

/// What a reservation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReserveReply {
    /// Holds the granted slots; `None` if none was.
    pub lease: Option<LeaseId>,
    /// Slots granted.
    pub granted: u32,
}

/// What a commit did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CommitReply {
    /// Slots whose part is committed by this call.
    pub committed: u32,
    /// Blocks that became Ready by it.
    pub ready: u32,
    /// Slots refused: wrong lease, part or word, or the part was closed before.
    pub refused: u32,
}

/// What an abort did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AbortReply {
    /// Slots whose part is closed by this call.
    pub aborted: u32,
    /// Slots refused: wrong lease, part or word, or the part was closed before.
    pub refused: u32,
}
