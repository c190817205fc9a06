//! kvmp-core's pieces as Python classes, to be tested, replayed and reused from there: `kvmp.core`.

pub mod index;
pub mod policy;
pub mod ring;

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::Geometry;
use pyo3::prelude::*;

use crate::errors::invalid;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seconds since whenever the caller began to count, as the core counts them.
fn ticks(py: Python<'_>, now_s: f64) -> PyResult<Ticks> {
    if !(0.0..=1e12).contains(&now_s) {
        return Err(invalid(py, "now_s", format!("{now_s} is no time in seconds from 0 on")));
    }
    Ok(Ticks((now_s * Ticks::PER_SECOND as f64) as u64))
}

fn geometry(py: Python<'_>, arena_bytes: u64, chunk_bytes: Option<u64>) -> PyResult<Geometry> {
    Geometry::new(arena_bytes, chunk_bytes).map_err(|error| invalid(py, "arena_bytes", error))
}
