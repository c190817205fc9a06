//! What a worker says of its part: `Client.commit`, `Client.abort`; and `Client.check`.

use kvmp_core::slot::PartSum;
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arguments::{array, list};
use crate::client::Client;
use crate::errors::OrRaise;
use crate::numbers::{float, integer, name};
use crate::wait::bounded;

impl Client {
    /// Sums `(n,)` of uint64 as the wire has them, with the length of this client's part.
    fn sums_of_parts(&self, py: Python<'_>, sums: &Bound<'_, PyAny>, slots: &[u32]) -> PyResult<Vec<PartSum>> {
        self.inner.part_sums(slots, &list::<u64>(sums, "sums")?).or_raise(py)
    }
}

#[pymethods]
impl Client {
    /// Says that this client's part of some slots is written; returns how many the server took.
    ///
    /// slots uint32 `(n,)`, words uint64 `(n,)` of the grant; sums: xxh3-64 of each part, uint64 `(n,)`, or None.
    #[pyo3(signature = (lease_id, slots, words, sums=None, timeout_ms=100.0))]
    fn commit(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::LeaseId, _>)] lease_id: u64,
        slots: &Bound<'_, PyAny>,
        words: &Bound<'_, PyAny>,
        sums: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<u32> {
        let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
        let sums = sums.map(|sums| self.sums_of_parts(py, sums, &slots)).transpose()?;
        bounded(py, timeout_ms, |bound| self.inner.commit(lease_id, &slots, &words, sums.as_deref(), bound))
    }

    /// Gives up this client's part of some slots; returns how many the server took.
    #[pyo3(signature = (lease_id, slots, words, timeout_ms=100.0))]
    fn abort(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::LeaseId, _>)] lease_id: u64,
        slots: &Bound<'_, PyAny>,
        words: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<u32> {
        let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
        bounded(py, timeout_ms, |bound| self.inner.abort(lease_id, &slots, &words, bound))
    }

    /// Says that the bytes of these blocks are wrong, so that the server evicts them; returns how many it still had.
    #[pyo3(signature = (slots, words, timeout_ms=100.0))]
    fn distrust(
        &self,
        py: Python<'_>,
        slots: &Bound<'_, PyAny>,
        words: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<u32> {
        let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
        bounded(py, timeout_ms, |bound| self.inner.distrust(&slots, &words, bound))
    }

    /// Whether each slot still has its leased word, bool `(n,)`; no message. After the copy has ended.
    fn check<'py>(
        &self,
        py: Python<'py>,
        slots: &Bound<'py, PyAny>,
        words: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArray1<bool>>> {
        let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
        Ok(array(py, &self.inner.check(&slots, &words).or_raise(py)?))
    }
}
