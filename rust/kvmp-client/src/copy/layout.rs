//! Where the bytes of a block lie in an engine's memory, checked once.

use super::CopyError;
use super::disjoint::check_disjoint;

/// One run of bytes of every block: block `b` has it at `addr + b * block_stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Address of block 0's bytes.
    pub addr: usize,
    /// Bytes from one block's run to the next one's.
    pub block_stride: isize,
    /// Bytes of the run.
    pub len: usize,
    /// Where the run goes in the part, bytes.
    pub part_offset: usize,
}

impl Run {
    /// Where the part goes on after this run, bytes.
    pub(super) fn part_end(&self) -> usize {
        self.part_offset + self.len
    }

    /// Address of `block`'s bytes; in bounds for every block of a layout that holds this run.
    pub(super) fn addr_of(&self, block: u32) -> usize {
        self.addr.wrapping_add_signed(self.block_stride.wrapping_mul(block as isize))
    }

    /// First address and end of all blocks' bytes, or nothing if they leave the address space.
    pub(super) fn span(&self, num_blocks: u32) -> Option<(usize, usize)> {
        let reach = self.block_stride.checked_mul(isize::try_from(num_blocks.checked_sub(1)?).ok()?)?;
        let last = self.addr.checked_add_signed(reach)?;
        let end = self.addr.max(last).checked_add(self.len)?;
        (isize::try_from(end).is_ok() && self.len > 0 && self.addr.min(last) > 0).then_some((self.addr.min(last), end))
    }

    /// Whether `next` goes on where this run ends, in memory and for every block.
    fn joins(&self, next: &Self, num_blocks: u32) -> bool {
        self.addr + self.len == next.addr && (num_blocks == 1 || self.block_stride == next.block_stride)
    }
}

/// The runs of a block, in the order of the part's bytes; immutable.
///
/// Invariants: the runs tile `0..part_bytes`; no two blocks and no two runs share a byte of memory; every
/// address of every block fits the address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    runs: Vec<Run>,
    num_blocks: u32,
    part_bytes: usize,
}

impl BlockLayout {
    /// Checks `runs`, in any order, for `num_blocks` blocks, and joins those that lie end to end in memory and part.
    ///
    /// # Errors
    /// Runs that are empty, do not tile the part, leave the address space or overlap in memory.
    pub fn new(mut runs: Vec<Run>, num_blocks: u32) -> Result<Self, CopyError> {
        if runs.is_empty() || num_blocks == 0 {
            return Err(CopyError::Empty { runs: runs.len(), num_blocks });
        }
        if let Some(&run) = runs.iter().find(|run| run.span(num_blocks).is_none()) {
            return Err(CopyError::Extent { run, num_blocks });
        }
        runs.sort_unstable_by_key(|run| run.part_offset);
        let part_bytes = tiled_bytes(&runs)?;
        let runs = coalesce(runs, num_blocks);
        check_disjoint(&runs, num_blocks)?;
        Ok(Self { runs, num_blocks, part_bytes })
    }

    /// The runs after joining, by part offset.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Blocks of the memory described.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Bytes of one block over all runs, which is what a part of it takes.
    #[must_use]
    pub fn part_bytes(&self) -> usize {
        self.part_bytes
    }

    /// The runs from the one that holds byte `part_offset` on.
    pub(super) fn runs_from(&self, part_offset: usize) -> &[Run] {
        let first = self.runs.partition_point(|run| run.part_end() <= part_offset);
        &self.runs[first..]
    }
}

/// Bytes that the sorted runs tile.
fn tiled_bytes(runs: &[Run]) -> Result<usize, CopyError> {
    runs.iter().try_fold(0usize, |expected, run| {
        let tiling = CopyError::Tiling { expected, found: run.part_offset };
        if run.part_offset != expected {
            return Err(tiling);
        }
        expected.checked_add(run.len).ok_or(tiling)
    })
}

fn coalesce(runs: Vec<Run>, num_blocks: u32) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.joins(&run, num_blocks) => last.len += run.len,
            _ => joined.push(run),
        }
    }
    joined
}
