//! One budget for all calls of a thread: an engine's thread has one for each of its steps.
//!
//! no budget -> limited{left, waited} -> limited anew, or no budget; a limited call's bound is at most what is left.

use std::cell::Cell;
use std::time::Duration;

use pyo3::prelude::*;

thread_local! {
    /// What is left of this thread's budget, if it has one, and what its calls have waited since that was said.
    static BUDGET: Cell<(Option<Duration>, Duration)> = const { Cell::new((None, Duration::ZERO)) };
}

/// From now on calls of this thread wait `left_us` microseconds at most, all together; without it, each its own bound.
///
/// Returns what calls of this thread have waited since this was last called, in microseconds.
#[pyfunction]
#[pyo3(signature = (left_us=None))]
pub fn limit_waits(left_us: Option<u64>) -> u64 {
    let (_, waited) = BUDGET.replace((left_us.map(Duration::from_micros), Duration::ZERO));
    u64::try_from(waited.as_micros()).unwrap_or(u64::MAX)
}

/// A call's bound, cut to what is left of this thread's budget.
pub fn cut(limit: Duration) -> Duration {
    BUDGET.get().0.map_or(limit, |left| limit.min(left))
}

/// A call of this thread has waited so long.
pub fn spend(waited: Duration) {
    let (left, before) = BUDGET.get();
    BUDGET.set((left.map(|left| left.saturating_sub(waited)), before + waited));
}
