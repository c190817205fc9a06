//! What a copy may not name, looked at before its first byte: for CPU copies here and for a GPU's.

use super::{BlockLayout, CopyError};

/// The chunks as mapped by this process: an address and a length, no claim on the bytes.
#[derive(Debug, Clone, Copy)]
pub struct ArenaView {
    base: usize,
    len: usize,
}

impl ArenaView {
    /// View of `len` bytes of arena from `base` on.
    #[must_use]
    pub fn new(base: *mut u8, len: usize) -> Self {
        Self { base: base.expose_provenance(), len }
    }

    /// Address of its first byte.
    pub(super) fn base(&self) -> usize {
        self.base
    }

    /// Bytes of the arena.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Refuses a store of blocks to parts: `pairs` are (block id, offset in the arena of its part).
///
/// # Errors
/// A block id or a part out of range, or parts that overlap.
pub fn check_store(layout: &BlockLayout, arena: ArenaView, pairs: &[(u32, u64)]) -> Result<(), CopyError> {
    check_bounds(layout, arena, pairs)?;
    check_parts_apart(pairs, layout.part_bytes())
}

/// Refuses a load of parts into blocks: `pairs` are (block id, offset in the arena of its part).
///
/// # Errors
/// A block id or a part out of range, or a block named twice.
pub fn check_load(layout: &BlockLayout, arena: ArenaView, pairs: &[(u32, u64)]) -> Result<(), CopyError> {
    check_bounds(layout, arena, pairs)?;
    check_blocks_once(pairs)
}

fn check_bounds(layout: &BlockLayout, arena: ArenaView, pairs: &[(u32, u64)]) -> Result<(), CopyError> {
    pairs.iter().try_for_each(|&(block, offset)| check_pair(layout, arena, block, offset))
}

fn check_pair(layout: &BlockLayout, arena: ArenaView, block: u32, offset: u64) -> Result<(), CopyError> {
    let (num_blocks, part_bytes) = (layout.num_blocks(), layout.part_bytes());
    if block >= num_blocks {
        return Err(CopyError::Block { block, num_blocks });
    }
    match offset.checked_add(part_bytes as u64) {
        Some(end) if end <= arena.len() as u64 => Ok(()),
        _ => Err(CopyError::Arena { offset, part_bytes, arena_bytes: arena.len() }),
    }
}

fn check_blocks_once(pairs: &[(u32, u64)]) -> Result<(), CopyError> {
    let mut blocks: Vec<u32> = pairs.iter().map(|&(block, _)| block).collect();
    blocks.sort_unstable();
    match blocks.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(CopyError::DuplicateBlock { block: two[0] }),
        None => Ok(()),
    }
}

fn check_parts_apart(pairs: &[(u32, u64)], part_bytes: usize) -> Result<(), CopyError> {
    let mut offsets: Vec<u64> = pairs.iter().map(|&(_, offset)| offset).collect();
    offsets.sort_unstable();
    match offsets.windows(2).find(|two| two[1] - two[0] < part_bytes as u64) {
        Some(two) => Err(CopyError::PartsOverlap { first: two[0], second: two[1] }),
        None => Ok(()),
    }
}
