//! `Client.stats`, `Client.clear`.

use pyo3::prelude::*;

use crate::client::Client;
use crate::numbers::{float, name};
use crate::wait::bounded;

#[pymethods]
impl Client {
    /// The server's counters as a dict.
    #[pyo3(signature = (timeout_ms=1000.0))]
    fn stats<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let json = bounded(py, timeout_ms, |bound| self.inner.stats(bound))?;
        py.import("json")?.call_method1("loads", (json,))
    }

    /// Evicts every block that is Ready and not pinned; returns how many.
    #[pyo3(signature = (timeout_ms=1000.0))]
    fn clear(&self, py: Python<'_>, #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64) -> PyResult<u32> {
        bounded(py, timeout_ms, |bound| self.inner.clear(bound))
    }
}
