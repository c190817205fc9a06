//! Streams and events that end with their owner.

use std::sync::Arc;

use cudarc::driver::result::{event, stream};
use cudarc::driver::sys;

use crate::end::End;
use crate::error::Doing;
use crate::{CudaError, Device};

/// A stream of its own, of the lowest priority: the engine's work goes first.
#[derive(Debug)]
pub(crate) struct Stream {
    raw: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: a stream handle may be used from any thread; the driver locks what it must.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub fn new(device: Arc<Device>) -> Result<Self, CudaError> {
        let _here = device.enter()?;
        let (least, _) = stream::get_priority_range().doing("asking for stream priorities")?;
        let raw = stream::create_with_priority(stream::StreamKind::NonBlocking, least).doing("making a stream")?;
        Ok(Self { raw, device })
    }

    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Whatever is submitted from here on waits for an event of another stream; the host does not.
    pub fn wait_for(&self, event: u64) -> Result<(), CudaError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the stream lives; the caller of the copy vouches for the event.
        unsafe { stream::wait_event(self.raw, event as sys::CUevent, flags) }.doing("waiting for the engine's event")
    }

    /// Tells `end` once all that was submitted has ended well.
    pub fn tell_at_end(&self, end: &Arc<End>) -> Result<(), CudaError> {
        let end = Arc::into_raw(Arc::clone(end)).cast_mut().cast();
        // SAFETY: `tell` takes back the reference given here; where the driver refuses, it is taken back below.
        let done = unsafe { stream::launch_host_function(self.raw, tell, end) }.doing("asking to be told of the end");
        if done.is_err() {
            // SAFETY: refused, so `tell` never runs, and the reference is still ours.
            drop(unsafe { Arc::from_raw(end.cast::<End>()) });
        }
        done
    }

    /// Waits on the host until all that was submitted has ended, also where it failed.
    pub fn finish(&self) {
        // SAFETY: the stream lives.
        let _ = unsafe { stream::synchronize(self.raw) };
    }
}

/// # Safety
/// `end` is a reference that `Arc::into_raw` gave away, for this one call.
unsafe extern "C" fn tell(end: *mut std::ffi::c_void) {
    // SAFETY: the reference that `tell_at_end` gave away, once.
    let end = unsafe { Arc::from_raw(end.cast::<End>()) };
    end.tell();
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: made by `new`; copies that are under way hold an `Arc` of the lanes it is in.
        let _ = unsafe { stream::destroy(self.raw) };
    }
}

/// Marks a place in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    raw: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: an event handle may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub fn new(device: Arc<Device>) -> Result<Self, CudaError> {
        let _here = device.enter()?;
        // Who waits for it sleeps: the engine needs the core.
        let flags =
            sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32 | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        unsafe { sys::cuEventCreate(&raw mut raw, flags) }.result().doing("making an event")?;
        Ok(Self { raw, device })
    }

    /// Puts it behind all that was submitted to `stream`, wherever it was before.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both live.
        unsafe { event::record(self.raw, stream.raw) }.doing("recording an event")
    }

    /// Whether all before it has ended.
    pub fn has_ended(&self) -> Result<bool, CudaError> {
        let _here = self.device.enter()?;
        // SAFETY: the event lives.
        match unsafe { event::query(self.raw) } {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.doing("a copy").map(|()| true),
        }
    }

    /// Waits on the host until all before it has ended.
    pub fn wait(&self) -> Result<(), CudaError> {
        let _here = self.device.enter()?;
        // SAFETY: the event lives.
        unsafe { event::synchronize(self.raw) }.doing("a copy")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { event::destroy(self.raw) };
    }
}
