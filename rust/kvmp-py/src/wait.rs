//! The one wrapper round calls that can wait: the GIL released, the bound parsed, Ctrl-C honoured.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvmp_client::{Bound, ClientError};
use pyo3::prelude::*;

use crate::budget;
use crate::errors::{from_client, invalid};

/// Between two looks for signals: each takes the GIL.
const SIGNALS_EVERY: Duration = Duration::from_millis(100);

/// Runs `call` without the GIL, within `timeout_ms` milliseconds and what is left of the thread's budget. What it costs
/// the thread counts as waited, getting the GIL back included.
pub fn bounded<T: Send>(
    py: Python<'_>,
    timeout_ms: f64,
    call: impl FnOnce(&Bound<'_>) -> Result<T, ClientError> + Send,
) -> PyResult<T> {
    let limit = Duration::try_from_secs_f64(timeout_ms / 1000.0)
        .map_err(|_| invalid(py, "timeout_ms", format!("{timeout_ms} is no number of milliseconds from 0 on")))?;
    let limit = budget::cut(limit);
    let signal = Mutex::new(None);
    let from = Instant::now();
    let result = py.detach(|| {
        let looked = Cell::new(Instant::now());
        let interrupted = || {
            looked.get().elapsed() >= SIGNALS_EVERY && {
                looked.set(Instant::now());
                signal_came(&signal)
            }
        };
        call(&Bound::new(limit).or_until(&interrupted))
    });
    budget::spend(from.elapsed());
    match (result, signal.into_inner().unwrap_or_else(PoisonError::into_inner)) {
        (Err(ClientError::Interrupted), Some(error)) => Err(error),
        (result, _) => result.map_err(|error| from_client(py, &error)),
    }
}

fn signal_came(seen: &Mutex<Option<PyErr>>) -> bool {
    let Err(error) = Python::attach(|py| py.check_signals()) else { return false };
    *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    true
}
