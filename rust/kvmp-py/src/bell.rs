//! `Bell`: wakes the one thread that waits for whatever comes next.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;

use crate::errors::invalid;

/// Wakes the one thread that waits for whatever comes next: a job, or the end of a copy.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct Bell {
    pub inner: Arc<kvmp_cuda::Bell>,
}

#[pymethods]
impl Bell {
    #[new]
    fn new() -> Self {
        Self { inner: Arc::default() }
    }

    /// Ends the wait under way, or else the next one.
    fn ring(&self) {
        self.inner.ring();
    }

    /// Waits until rung, at most `wait_s` seconds (None: for ever); whether it was.
    #[pyo3(signature = (wait_s=None))]
    fn wait(&self, py: Python<'_>, wait_s: Option<f64>) -> PyResult<bool> {
        let limit = wait_s.map(Duration::try_from_secs_f64).transpose();
        let limit =
            limit.map_err(|_| invalid(py, "wait_s", format!("{wait_s:?} is no number of seconds from 0 on")))?;
        Ok(py.detach(|| self.inner.wait(limit)))
    }
}
