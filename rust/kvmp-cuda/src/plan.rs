//! Paged memory on a GPU as runs of bytes, and cut into tiles for the gather kernel.

use kvmp_client::copy::{BlockLayout, Run};

/// Bytes that one warp of the gather kernel moves at a time.
pub(crate) const TILE: usize = 4096;
/// The kernel moves whole vectors of so many bytes.
const VECTOR: usize = 16;

/// Paged memory on a GPU, as runs of bytes of every block.
#[derive(Debug)]
pub struct DeviceLayout {
    blocks: BlockLayout,
    /// Runs cut into tiles, for the kernel; empty where bytes are not in whole vectors.
    tiles: Vec<Tile>,
}

/// A piece of every block: block `b` has it at `addr + b * stride`. As the kernel reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    pub addr: u64,
    pub stride: i64,
    pub part_offset: u64,
    pub len: u64,
}

/// A block and where its part lies, as the kernel reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Address of the part as the GPU sees it.
    pub part: u64,
    pub block: u64,
}

impl DeviceLayout {
    /// The layout, whose addresses are the GPU's.
    #[must_use]
    pub fn new(blocks: BlockLayout) -> Self {
        let tiles = if blocks.runs().iter().all(is_in_vectors) { tiles(blocks.runs()) } else { Vec::new() };
        Self { blocks, tiles }
    }

    /// The layout as runs.
    #[must_use]
    pub fn blocks(&self) -> &BlockLayout {
        &self.blocks
    }

    /// Bytes of a run, on average: what decides between batched copies and the kernel.
    pub(crate) fn run_bytes(&self) -> usize {
        self.blocks.part_bytes() / self.blocks.runs().len()
    }

    pub(crate) fn tiles(&self) -> &[Tile] {
        &self.tiles
    }
}

fn is_in_vectors(run: &Run) -> bool {
    let stride = run.block_stride.unsigned_abs();
    [run.addr, stride, run.len, run.part_offset].iter().all(|bytes| bytes.is_multiple_of(VECTOR))
}

fn tiles(runs: &[Run]) -> Vec<Tile> {
    let cut = |run: &Run| {
        let run = *run;
        (0..run.len).step_by(TILE).map(move |at| Tile {
            addr: (run.addr + at) as u64,
            stride: run.block_stride as i64,
            part_offset: (run.part_offset + at) as u64,
            len: TILE.min(run.len - at) as u64,
        })
    };
    runs.iter().flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(len: usize, stride: isize) -> DeviceLayout {
        let run =
            |at: usize| Run { addr: 0x1000_0000 + at * 0x10_0000, block_stride: stride, len, part_offset: at * len };
        DeviceLayout::new(BlockLayout::new(vec![run(0), run(1)], 4).unwrap())
    }

    #[test]
    fn tiles_cover_each_run_once_and_in_order() {
        let layout = layout(2 * TILE + 32, 0x4000);
        let covered: u64 = layout.tiles().iter().map(|tile| tile.len).sum();
        assert_eq!((layout.tiles().len(), covered), (6, layout.blocks().part_bytes() as u64));
        let mut expected = 0;
        for tile in layout.tiles() {
            assert_eq!(tile.part_offset, expected);
            expected += tile.len;
        }
    }

    #[test]
    fn bytes_that_are_no_whole_vectors_have_no_tiles() {
        assert!(layout(40, 64).tiles().is_empty());
        assert!(layout(32, 40).tiles().is_empty());
        assert!(!layout(32, 48).tiles().is_empty());
    }
}
