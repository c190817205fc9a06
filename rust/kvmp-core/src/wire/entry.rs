//! Ring entries: 64 bytes each, and what lies in the scratch ranges they name.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::ring::Entry;

pub use crate::namespace::LOOKUP_MAX;

/// What a submission asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Op {
    /// Answered at once, nothing done.
    Ping = 1,
    /// Hash list -> hit, read lease.
    Lookup = 2,
    /// Hash list -> slots to write, write lease.
    Reserve = 3,
    /// A part of some slots is written.
    Commit = 4,
    /// A worker gives up its part of some slots.
    Abort = 5,
    /// A scheduler gives up a write lease that it told no worker of.
    Cancel = 6,
    /// Ends a read lease.
    Release = 7,
    /// Counters as JSON.
    Stats = 8,
    /// Evicts what is Ready and not pinned.
    Clear = 9,
    /// Reserved: promote from a lower tier.
    Fetch = 10,
    /// A worker found the bytes of its part of some slots wrong: their blocks are evicted.
    Distrust = 11,
}

impl Op {
    /// The op of a number.
    #[must_use]
    pub fn from_u8(raw: u8) -> Option<Self> {
        use Op::{Abort, Cancel, Clear, Commit, Distrust, Fetch, Lookup, Ping, Release, Reserve, Stats};
        [Ping, Lookup, Reserve, Commit, Abort, Cancel, Release, Stats, Clear, Fetch, Distrust]
            .into_iter()
            .find(|&op| op as u8 == raw)
    }
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Code {
    /// Done; the other fields hold.
    Ok = 0,
    /// The session has not opened or joined that namespace.
    UnknownNamespace = 1,
    /// The namespace has no such group.
    UnknownGroup = 2,
    /// No such lease, or not this engine's.
    UnknownLease = 3,
    /// The role of the session may not ask this.
    Forbidden = 4,
    /// A number or op that this server does not know.
    Unsupported = 5,
    /// The server is draining.
    ShuttingDown = 6,
    /// The out range is too small for the answer.
    OutTooSmall = 7,
}

impl Code {
    /// The code of a number.
    #[must_use]
    pub fn from_u16(raw: u16) -> Option<Self> {
        use Code::{
            Forbidden, Ok, OutTooSmall, ShuttingDown, UnknownGroup, UnknownLease, UnknownNamespace, Unsupported,
        };
        [Ok, UnknownNamespace, UnknownGroup, UnknownLease, Forbidden, Unsupported, ShuttingDown, OutTooSmall]
            .into_iter()
            .find(|&code| code as u16 == raw)
    }
}

/// What a reserve says of one hash. `Elsewhere` is reserved for lower tiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Answer {
    /// A slot to write.
    Granted = 0,
    /// Already Ready.
    Present = 1,
    /// Somebody is writing it.
    Pending = 2,
    /// Its predecessor is neither Ready nor Writing.
    NoParent = 3,
    /// No slot, and nothing that may be evicted.
    NoSpace = 4,
    /// The policy does not want it.
    NotAdmitted = 5,
    /// No slot yet: memory is still being backed.
    Warming = 6,
    /// Reserved: in a lower tier.
    Elsewhere = 7,
}

/// A submission queue entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Submission {
    /// Chosen by the client; comes back in the completion.
    pub request: u64,
    /// An [`Op`].
    pub op: u8,
    /// Bit 0: `has_parent` (a reserve's input begins with the key before its first hash).
    pub flags: u8,
    /// Namespace id.
    pub namespace: u16,
    /// Group, for reserve.
    pub group: u16,
    /// The session's own part, for commit and abort.
    pub part: u16,
    /// Keys, or slots, in the input range.
    pub count: u32,
    /// Hints for admission and eviction; 0 is none.
    pub hints: u32,
    /// Input range in the scratch area.
    pub in_offset: u32,
    /// Its length in bytes.
    pub in_bytes: u32,
    /// Output range in the scratch area.
    pub out_offset: u32,
    /// Its length in bytes.
    pub out_bytes: u32,
    /// Lease, for commit, abort, cancel, release.
    pub lease: u64,
    /// Index of the first block in its chain, for reserve, and for a lookup that goes on where another one ended.
    pub first_block: u32,
    /// Zero.
    pub reserved: u32,
    /// Zero.
    pub reserved2: u64,
}

impl Submission {
    /// Flag: a reserve's input begins with the key before its first hash.
    pub const HAS_PARENT: u8 = 1;

    /// As it lies in the queue.
    #[must_use]
    pub fn to_entry(self) -> Entry {
        zerocopy::transmute!(self)
    }

    /// From the queue: any 64 bytes are a submission, sense is checked by whoever serves it.
    #[must_use]
    pub fn from_entry(entry: Entry) -> Self {
        zerocopy::transmute!(entry)
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Completion {
    /// Request that this answers.
    pub request: u64,
    /// A [`Code`].
    pub code: u16,
    /// Bit 0: the read lease holds no pin (the engine is over its cap).
    pub flags: u16,
    /// Blocks hit, granted, committed, aborted or evicted.
    pub count: u32,
    /// Lease granted, 0 for none.
    pub lease: u64,
    /// Tokens hit.
    pub tokens: u32,
    /// Bytes written to the output range.
    pub out_bytes: u32,
    /// Zero.
    pub reserved: [u64; 4],
}

impl Completion {
    /// Flag: nothing is pinned.
    pub const UNPINNED: u16 = 1;

    /// As it lies in the queue.
    #[must_use]
    pub fn to_entry(self) -> Entry {
        zerocopy::transmute!(self)
    }

    /// From the queue.
    #[must_use]
    pub fn from_entry(entry: Entry) -> Self {
        zerocopy::transmute!(entry)
    }
}

/// A lookup's output begins with one of these a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct GroupOut {
    /// Index of the first block of the run.
    pub first_block: u32,
    /// Blocks in the run.
    pub count: u32,
}

/// Behind the groups of a lookup: one a block, group after group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct LookupOut {
    /// Slot number.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
    /// Slot word while the block is the one looked up.
    pub word: u64,
}

/// One a hash in a reserve's output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct GrantOut {
    /// Slot number, where granted.
    pub slot: u32,
    /// An [`Answer`].
    pub answer: u32,
    /// Slot word, where granted.
    pub word: u64,
}

/// One a slot in the input of a commit, an abort or a distrust.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct PartIn {
    /// Slot number.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
    /// Slot word of the grant.
    pub word: u64,
    /// The part's sum, length and flags (commit only).
    pub sum: crate::slot::PartSum,
}

/// Bytes of output that a lookup of `keys` hashes in `groups` groups may take.
#[must_use]
pub fn out_bytes_lookup(groups: usize, keys: usize) -> usize {
    groups * (size_of::<GroupOut>() + keys * size_of::<LookupOut>())
}

const _: () = assert!(size_of::<Submission>() == 64 && size_of::<Completion>() == 64 && size_of::<PartIn>() == 32);
