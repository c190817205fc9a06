//! Whether a segment that no server had meanwhile still has its chunks' memory: one that was made shorter and longer again
//! has its table, and zeroes where the table says that blocks lie.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use kvmp_core::ids::ChunkId;
use kvmp_core::segment::Layout;

/// Bytes that chunks have lost, as far as that can be told: header and namespaces have memory too, which makes up for
/// under 1 MiB of a loss, or as much as namespaces take.
pub(super) fn lost_bytes(file: &File, layout: &Layout) -> io::Result<u64> {
    let geometry = layout.geometry;
    let mut words = vec![0; geometry.chunks as usize * 8];
    file.read_exact_at(&mut words, layout.chunk_word(ChunkId(0)))?;
    // A word is not zero only once its chunk and its records have all their memory, and no server ever gives it back.
    let backed = words.chunks_exact(8).filter(|word| **word != [0; 8]).count() as u64;
    let had = backed * (geometry.chunk_bytes + geometry.chunk_table_bytes());
    // What is swapped out counts as memory here.
    Ok(had.saturating_sub(file.metadata()?.blocks() * 512))
}
