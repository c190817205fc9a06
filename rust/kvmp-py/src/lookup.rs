//! Lookup: `Client.submit_lookup`, `Client.lookup`, `PendingLookup`, `ReadLease`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arguments::{array, hashes};
use crate::budget;
use crate::client::Client;
use crate::errors::{OrRaise, invalid};
use crate::namespace::Namespace;
use crate::numbers::{float, integer, name};
use crate::wait::bounded;

/// A lookup under way.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct PendingLookup {
    inner: Mutex<Option<kvmp_client::PendingLookup>>,
}

/// A hit: slots and slot words to load from, pinned until released. A context manager.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct ReadLease {
    inner: Mutex<kvmp_client::ReadLease>,
}

impl ReadLease {
    fn new(inner: kvmp_client::ReadLease) -> Self {
        Self { inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, kvmp_client::ReadLease> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group<T>(&self, py: Python<'_>, group: u16, take: impl Fn(&kvmp_client::GroupRun) -> T) -> PyResult<T> {
        let lease = self.lock();
        lease.group(group).map(take).ok_or_else(|| invalid(py, "group", format!("the hit has no group {group}")))
    }
}

#[pymethods]
impl Client {
    /// Asks for the longest hit of a hash list, uint8 `(n, 32)`; never waits.
    fn submit_lookup(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        hashes: &Bound<'_, PyAny>,
    ) -> PyResult<PendingLookup> {
        let hashes = self::hashes(hashes)?;
        let pending = self.inner.submit_lookup(&namespace.inner, &hashes).or_raise(py)?;
        Ok(PendingLookup { inner: Mutex::new(Some(pending)) })
    }

    /// The longest hit of a hash list, uint8 `(n, 32)`.
    #[pyo3(signature = (namespace, hashes, timeout_ms=100.0))]
    fn lookup(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        hashes: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<ReadLease> {
        let hashes = self::hashes(hashes)?;
        bounded(py, timeout_ms, |bound| self.inner.lookup(&namespace.inner, &hashes, bound)).map(ReadLease::new)
    }
}

#[pymethods]
impl PendingLookup {
    /// The hit once it is known, else None. None again after it was given out or abandoned.
    ///
    /// Never waits, but until the lookup is `moment_us` microseconds old, if it is younger: what is left of the thread's
    /// budget bounds that (`limit_waits`) and is charged with it. The GIL is kept: to get it back may take longer.
    #[pyo3(signature = (moment_us=0))]
    fn poll(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::MomentUs, _>)] moment_us: u32,
    ) -> PyResult<Option<ReadLease>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pending) = inner.as_mut() else { return Ok(None) };
        let moment = Duration::from_micros(moment_us.into());
        let from = Instant::now();
        let polled = pending.poll_for(moment, budget::cut(moment)).or_raise(py);
        if moment_us > 0 {
            budget::spend(from.elapsed());
        }
        if !matches!(polled, Ok(None)) {
            inner.take();
        }
        Ok(polled?.map(ReadLease::new))
    }

    /// Gives it up: a hit that comes late is released by the client.
    fn abandon(&self) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[pymethods]
impl ReadLease {
    /// Tokens hit.
    #[getter]
    fn tokens(&self) -> u64 {
        self.lock().tokens()
    }

    /// Blocks of a group in the hit.
    #[pyo3(signature = (group=0))]
    fn blocks(&self, py: Python<'_>, #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16) -> PyResult<usize> {
        self.group(py, group, |run| run.slots.len())
    }

    /// Slot numbers of a group's blocks, uint32 `(blocks,)`.
    #[pyo3(signature = (group=0))]
    fn slots<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        self.group(py, group, |run| array(py, &run.slots))
    }

    /// Their slot words, uint64 `(blocks,)`.
    #[pyo3(signature = (group=0))]
    fn words<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        self.group(py, group, |run| array(py, &run.words))
    }

    /// Index of the first of a group's blocks in the chain.
    #[pyo3(signature = (group=0))]
    fn first_block(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
    ) -> PyResult<u32> {
        self.group(py, group, |run| run.first_block)
    }

    /// Whether the blocks are pinned: over its cap an engine gets hits without.
    #[getter]
    fn pinned(&self) -> bool {
        self.lock().pinned()
    }

    /// Life of the server that granted it (u64).
    #[getter]
    fn server_epoch(&self) -> u64 {
        self.lock().server_epoch()
    }

    /// Identity of the segment that the slots are in, hex.
    #[getter]
    fn segment_id(&self) -> String {
        self.lock().segment_id().to_owned()
    }

    /// Seconds since the reply was taken; the server drops pins after 60.
    #[getter]
    fn age_s(&self) -> f64 {
        self.lock().age().as_secs_f64()
    }

    /// Ends the lease without waiting; never raises, again is harmless.
    fn release(&self) {
        self.lock().release();
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyAny>) {
        self.release();
    }
}
