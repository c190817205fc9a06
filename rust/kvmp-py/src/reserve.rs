//! Reserve: `Client.submit_reserve`, `Client.reserve`, `PendingReserve`, `WriteLease`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmp_client::ReserveList;
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arguments::{array, hashes, parent};
use crate::client::Client;
use crate::errors::OrRaise;
use crate::namespace::Namespace;
use crate::numbers::{float, integer, name};
use crate::wait::bounded;

/// A reserve under way.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct PendingReserve {
    inner: Mutex<Option<kvmp_client::PendingReserve>>,
}

/// Slots to write, one answer a hash. A context manager that cancels unless handed over.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct WriteLease {
    inner: Mutex<kvmp_client::WriteLease>,
}

impl WriteLease {
    fn new(inner: kvmp_client::WriteLease) -> Self {
        Self { inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, kvmp_client::WriteLease> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Client {
    /// Asks for slots for consecutive blocks `first_block..`, hashes uint8 `(n, 32)`; never waits.
    ///
    /// `parent` is the hash before the first one, None for block 0.
    #[pyo3(signature = (namespace, hashes, *, first_block, parent=None, group=0))]
    fn submit_reserve(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        hashes: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = integer::<name::FirstBlock, _>)] first_block: u32,
        parent: Option<&[u8]>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
    ) -> PyResult<PendingReserve> {
        let (hashes, parent) = (self::hashes(hashes)?, self::parent(py, parent)?);
        let list = ReserveList { hashes: &hashes, first_block, parent: parent.as_ref(), group };
        let pending = self.inner.submit_reserve(&namespace.inner, &list).or_raise(py)?;
        Ok(PendingReserve { inner: Mutex::new(Some(pending)) })
    }

    /// Slots for consecutive blocks `first_block..`, hashes uint8 `(n, 32)`.
    #[pyo3(signature = (namespace, hashes, *, first_block, parent=None, group=0, timeout_ms=100.0))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn reserve(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        hashes: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = integer::<name::FirstBlock, _>)] first_block: u32,
        parent: Option<&[u8]>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<WriteLease> {
        let (hashes, parent) = (self::hashes(hashes)?, self::parent(py, parent)?);
        let list = ReserveList { hashes: &hashes, first_block, parent: parent.as_ref(), group };
        bounded(py, timeout_ms, |bound| self.inner.reserve(&namespace.inner, &list, bound)).map(WriteLease::new)
    }
}

#[pymethods]
impl PendingReserve {
    /// The lease once the answer is there, else None; never waits. None again after it was given out or abandoned.
    fn poll(&self, py: Python<'_>) -> PyResult<Option<WriteLease>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pending) = inner.as_mut() else { return Ok(None) };
        let polled = pending.poll().or_raise(py);
        if !matches!(polled, Ok(None)) {
            inner.take();
        }
        Ok(polled?.map(WriteLease::new))
    }

    /// Gives it up: what is granted late is cancelled by the client.
    fn abandon(&self) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[pymethods]
impl WriteLease {
    /// Number of the lease (u64), for commit and abort; 0 where nothing was granted.
    #[getter]
    fn lease_id(&self) -> u64 {
        self.lock().lease_id()
    }

    /// One answer a hash, uint8 `(n,)`: `kvmp.client.Answer`.
    #[getter]
    fn answers<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        array(py, self.lock().answers())
    }

    /// Slot numbers, uint32 `(n,)`; valid where granted.
    #[getter]
    fn slots<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        array(py, self.lock().slots())
    }

    /// Slot words, uint64 `(n,)`; valid where granted.
    #[getter]
    fn words<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        array(py, self.lock().words())
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

    /// A worker has been told of the lease: workers commit or abort from here on, and exit cancels nothing.
    fn handed_over(&self) {
        self.lock().hand_over();
    }

    /// Gives the lease up without waiting; nothing happens once it was handed over.
    fn cancel(&self) {
        self.lock().cancel();
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyAny>) {
        self.cancel();
    }
}
