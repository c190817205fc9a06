//! A slot's word and record.
//!
//! `Free -> Writing{open parts} -> Ready{pins} -> Free`; the generation goes up with each grant and is
//! never reset, so a (generation, Ready) word never returns.

use crate::ids::{BlockKey, GroupId, NamespaceId, SlotId};

/// State held in the slot word. Quarantined slots keep `Writing` here; only the server's memory knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SlotState {
    /// Nobody may read or write the bytes.
    Free = 0,
    /// Parts of a granted block are being written.
    Writing = 1,
    /// Every part is committed; the bytes do not change until the word does.
    Ready = 2,
}

/// The atomic word that guards a slot: generation (48 bits), state (8 bits), spare (8 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(transparent)]
pub struct SlotWord(pub u64);

impl SlotWord {
    const STATE_SHIFT: u32 = 8;
    const GENERATION_SHIFT: u32 = 16;

    /// Word of `generation` (its low 48 bits) in `state`.
    #[must_use]
    pub fn new(generation: u64, state: SlotState) -> Self {
        Self((generation << Self::GENERATION_SHIFT) | ((state as u64) << Self::STATE_SHIFT))
    }

    /// How often the slot was granted.
    #[must_use]
    pub fn generation(self) -> u64 {
        self.0 >> Self::GENERATION_SHIFT
    }

    /// The state, or the raw byte where no state has it.
    pub fn state(self) -> Result<SlotState, u8> {
        match (self.0 >> Self::STATE_SHIFT) as u8 {
            0 => Ok(SlotState::Free),
            1 => Ok(SlotState::Writing),
            2 => Ok(SlotState::Ready),
            other => Err(other),
        }
    }

    /// Same generation, other state.
    #[must_use]
    pub fn with_state(self, state: SlotState) -> Self {
        Self::new(self.generation(), state)
    }
}

/// What a grant writes into a record beside the word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockIdentity {
    /// Engine's block hash.
    pub key: BlockKey,
    /// Namespace the block belongs to.
    pub namespace: NamespaceId,
    /// Group of that namespace.
    pub group: GroupId,
    /// Index of the block in its chain (0 = first).
    pub position: u32,
    /// Slot of the block before it; `SlotId::NONE` at position 0 and in groups that are not prefix groups.
    pub parent: SlotId,
    /// Bytes of the block over all parts, before rounding up.
    pub bytes: u32,
}

/// What a writer says of a part with its commit: 16 bytes in the table of parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C)]
pub struct PartSum {
    /// xxh3-64 of the part's bytes; meaningful only with [`PartSum::HAS_SUM`].
    pub xxh3: u64,
    /// Length of the part in bytes.
    pub length: u32,
    /// Bit set of `HAS_SUM`.
    pub flags: u32,
}

impl PartSum {
    /// `xxh3` was computed.
    pub const HAS_SUM: u32 = 1;
}
