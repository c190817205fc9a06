//! `Transfer`: a copy between a GPU and the arena that was begun.
//!
//! The GPU tells of its end, so that a copy that has ended is looked at, waited for and dropped without a call of the driver.
//! Any such call may wait for the driver's lock, for tens of milliseconds while memory is registered, and therefore gives the
//! GIL away; but getting that back beside a busy engine takes 5 ms, so it is made now and then only.

use std::mem::ManuallyDrop;

use pyo3::prelude::*;

use crate::cuda::from_cuda;

/// A copy under way; keeps the holder entry locked and the arena mapped. Dropped before its end, it waits for that.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct Transfer {
    inner: ManuallyDrop<kvmp_cuda::Transfer>,
}

impl Transfer {
    pub fn new(inner: kvmp_cuda::Transfer) -> Self {
        Self { inner: ManuallyDrop::new(inner) }
    }
}

#[pymethods]
impl Transfer {
    /// Whether the last byte has moved, as far as the GPU has told. Raises `DeviceError` where it failed, which may be seen
    /// 10 ms later: what was moved is garbage then.
    fn has_ended(&self, py: Python<'_>) -> PyResult<bool> {
        match self.inner.glance() {
            Some(has_ended) => Ok(has_ended),
            None => py.detach(|| self.inner.has_ended()).map_err(|error| from_cuda(py, &error)),
        }
    }

    /// Sleeps until the last byte has moved; raises as `has_ended`.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        if self.inner.is_told() {
            return Ok(());
        }
        py.detach(|| self.inner.wait()).map_err(|error| from_cuda(py, &error))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nothing uses it afterwards.
        let inner = unsafe { ManuallyDrop::take(&mut self.inner) };
        if !inner.is_told() {
            drop_detached(inner);
        }
    }
}

/// Drops what may wait for the driver or for a copy, with the GIL released.
pub fn drop_detached<T: Send>(value: T) {
    // Where the interpreter is gone nobody waits for the GIL: it is dropped all the same.
    let _ = Python::try_attach(move |py| py.detach(move || drop(value)));
}
