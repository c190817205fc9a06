//! One GPU, through the primary context that torch uses too.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use crate::CudaError;
use crate::error::Doing;

/// A GPU of this process.
#[derive(Debug)]
pub struct Device {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: a context handle may be used from any thread; the driver locks what it must.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for Device {}

impl Device {
    /// The GPU of this ordinal among those visible (`CUDA_VISIBLE_DEVICES`), numbered as torch numbers them.
    ///
    /// # Errors
    /// No driver, no such GPU, or one that cannot be used.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, CudaError> {
        // SAFETY: looks whether the library can be loaded; its initialisers are the driver's.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        result::init().doing("starting the CUDA driver")?;
        let device = result::device::get(ordinal as i32).doing("looking for the GPU")?;
        // SAFETY: the handle is what the driver just gave.
        let context = unsafe { result::primary_ctx::retain(device) }.doing("opening the GPU")?;
        Ok(Arc::new(Self { ordinal, device, context }))
    }

    /// Its number.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Makes the GPU this thread's until the value goes.
    pub(crate) fn enter(&self) -> Result<Entered, CudaError> {
        let before = result::ctx::get_current().doing("asking for the thread's GPU")?;
        // SAFETY: the context was retained, and is released only when this value goes.
        unsafe { result::ctx::set_current(self.context) }.doing("entering the GPU")?;
        Ok(Entered { before: before.unwrap_or(std::ptr::null_mut()) })
    }

    /// Whether the driver exports a function: one that a newer version brought.
    pub(crate) fn has(&self, function: &str) -> bool {
        // SAFETY: the library is loaded, as a device was opened.
        let library = unsafe { sys::culib() };
        // SAFETY: the symbol is only looked up, not called.
        unsafe { library.get::<*const ()>(function.as_bytes()) }.is_ok()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once, in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// The thread is in a GPU's context; the one it was in before comes back with the end of this.
pub(crate) struct Entered {
    before: sys::CUcontext,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: the context was current on this thread, or is null for none.
        let _ = unsafe { result::ctx::set_current(self.before) };
    }
}
