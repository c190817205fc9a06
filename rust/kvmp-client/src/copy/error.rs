//! Why a layout or a copy is refused; nothing has been copied then.

use super::Run;

/// A layout that cannot be, or a copy outside its bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// A layout of nothing.
    #[error("a block layout needs at least one run of bytes and one block; got {runs} runs and {num_blocks} blocks")]
    Empty {
        /// Runs given.
        runs: usize,
        /// Blocks given.
        num_blocks: u32,
    },
    /// A run of no bytes, or one that leaves the address space.
    #[error("{run:x?} over {num_blocks} blocks is empty or leaves the address space")]
    Extent {
        /// The run.
        run: Run,
        /// Blocks of the layout.
        num_blocks: u32,
    },
    /// The runs leave a gap in the part, or two of them claim the same bytes of it.
    #[error("the runs must tile the part: after {expected} bytes comes a run at part offset {found}")]
    Tiling {
        /// Where the next run had to start, bytes.
        expected: usize,
        /// Where it starts, bytes.
        found: usize,
    },
    /// Two blocks of one run share memory.
    #[error("{run:x?}: its blocks overlap, as the stride is shorter than the run; expanded tensors cannot be cached")]
    BlocksOverlap {
        /// The run.
        run: Run,
    },
    /// Two runs share memory, or lie in each other's span with different block strides.
    #[error("{first:x?} and {second:x?} overlap in memory, or interleave with different block strides")]
    RunsOverlap {
        /// The run at the lower address.
        first: Run,
        /// The other one.
        second: Run,
    },
    /// A block id that the layout does not have.
    #[error("block id {block} is out of range: there are {num_blocks} blocks")]
    Block {
        /// The id.
        block: u32,
        /// Blocks of the layout.
        num_blocks: u32,
    },
    /// A part that does not lie in the arena.
    #[error("a part of {part_bytes} bytes at arena offset {offset} is outside the arena of {arena_bytes} bytes")]
    Arena {
        /// Offset of the part, bytes.
        offset: u64,
        /// Bytes of the part.
        part_bytes: usize,
        /// Bytes of the arena.
        arena_bytes: usize,
    },
    /// A load into the same block twice: which bytes would win is chance.
    #[error("block id {block} is named twice in one load")]
    DuplicateBlock {
        /// The id.
        block: u32,
    },
    /// A store to arena bytes twice: which bytes would win is chance.
    #[error("one store names overlapping parts at arena offsets {first} and {second}; each slot may be named once")]
    PartsOverlap {
        /// Lower offset, bytes.
        first: u64,
        /// Higher offset, bytes.
        second: u64,
    },
    /// `threads` of zero.
    #[error("threads must be 1 or more, or left out for as many as help")]
    NoThreads,
}
