//! The holder entry: open as long as a copy of this session may still move a byte.
//!
//! Its descriptor is never mapped and never passed on; a forked child closes it. A free entry tells the server that no
//! more stores come from here, so it outlives the session by its last copy.

use std::sync::{Arc, Mutex, PoisonError};

use crate::fork::LocalFd;

/// Proof that a copy may run: while one exists, the holder entry stays locked.
#[derive(Debug, Clone)]
pub struct CopyGuard {
    _holder: Arc<LocalFd>,
}

/// The session's own hold on the entry.
#[derive(Debug)]
pub(crate) struct Holder(Mutex<Option<Arc<LocalFd>>>);

impl Holder {
    pub fn new(fd: LocalFd) -> Self {
        Self(Mutex::new(Some(Arc::new(fd))))
    }

    /// A guard for one copy; `None` once the session gave the entry up.
    pub fn guard(&self) -> Option<CopyGuard> {
        let holder = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        holder.as_ref().map(|fd| CopyGuard { _holder: fd.clone() })
    }

    /// No further copies; the entry is freed when the last guard goes.
    pub fn give_up(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
