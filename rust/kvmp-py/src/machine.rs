//! What the server knows of the machine: where its socket is by default, what bounds its memory, what is left of one.

use std::path::PathBuf;

use pyo3::prelude::*;

/// Path of the socket of a server of this name that is given none.
#[pyfunction]
pub fn default_socket(name: &str) -> PathBuf {
    kvmp_server::default_socket(name)
}

/// Bytes of the arena that a server of this name would find in `arena_dir` and go on with; None where there is none.
#[pyfunction]
pub fn kept_arena_bytes(name: &str, arena_dir: PathBuf) -> Option<u64> {
    kvmp_server::kept_arena_bytes(&arena_dir, name)
}

/// Whether this folder's file system is in memory, as that of an arena must be.
#[pyfunction]
pub fn lies_in_memory(dir: PathBuf) -> bool {
    kvmp_server::lies_in_memory(&dir)
}

/// Every bound on memory taken in `arena_dir` now: (what it is, bytes it could ever give, bytes free, what makes it larger).
#[pyfunction]
pub fn memory_bounds(arena_dir: PathBuf) -> Vec<(String, u64, u64, String)> {
    let all = kvmp_server::memory_bounds(&arena_dir);
    all.into_iter().map(|bound| (bound.what, bound.total, bound.free, bound.mend)).collect()
}
