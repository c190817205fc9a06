//! Descriptors that a forked child closes, and a cheap way to know that one is such a child.
//!
//! A child that kept the holder entry open would keep the server from ever taking a dead engine's slots back, and one
//! that kept the socket open would hide its parent's death. (Programs started by exec lose them by close-on-exec.)

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use kvmp_core::sync::{AtomicU64, Ordering};

static OPEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
static FORKS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The registry, held by the thread that forks, so that the child finds it whole.
    static FORKING: RefCell<Option<MutexGuard<'static, Vec<RawFd>>>> = const { RefCell::new(None) };
}

/// The registry of descriptors; while it is held, no thread of this process forks.
pub(crate) fn registry() -> MutexGuard<'static, Vec<RawFd>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Goes up in each forked child: what was made at another count belongs to a parent process.
pub(crate) fn forks() -> u64 {
    FORKS.load(Ordering::Relaxed)
}

/// Makes forks of this process close what is registered. Called before the first descriptor is.
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the handlers are plain functions of this library that live as long as the process.
        unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

unsafe extern "C" fn before() {
    let held = registry();
    FORKING.with(|forking| *forking.borrow_mut() = Some(held));
}

unsafe extern "C" fn in_parent() {
    FORKING.with(|forking| *forking.borrow_mut() = None);
}

unsafe extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    if let Some(mut open) = FORKING.with(|forking| forking.borrow_mut().take()) {
        for fd in open.drain(..) {
            // SAFETY: registered descriptors are owned by `LocalFd`s, which touch them no more in a child.
            unsafe { libc::close(fd) };
        }
    }
}

/// A descriptor that belongs to this process alone.
#[derive(Debug)]
pub(crate) struct LocalFd {
    fd: Option<OwnedFd>,
    forks: u64,
}

impl LocalFd {
    /// Takes a descriptor over; `registry` is held since before it existed, so that no fork slips in between.
    pub fn new(fd: OwnedFd, registry: &mut Vec<RawFd>) -> Self {
        registry.push(fd.as_raw_fd());
        Self { fd: Some(fd), forks: forks() }
    }

    /// Whether this process is a fork of the one that owns it.
    pub fn is_forked(&self) -> bool {
        self.forks != forks()
    }

    /// The descriptor; `None` in a forked child, where it is closed.
    pub fn get(&self) -> Option<BorrowedFd<'_>> {
        if self.is_forked() { None } else { self.fd.as_ref().map(AsFd::as_fd) }
    }
}

impl Drop for LocalFd {
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        if self.is_forked() {
            // Closed by the child's handler; the number may be another file's by now.
            std::mem::forget(fd);
            return;
        }
        let mut open = registry();
        open.retain(|&other| other != fd.as_raw_fd());
        drop(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the descriptor is open, told by the exit code of a forked child.
    fn open_in_child(fd: &LocalFd) -> bool {
        let raw = fd.fd.as_ref().map(AsRawFd::as_raw_fd).unwrap();
        // SAFETY: the child makes two system calls, both safe after a fork, and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: asking for a descriptor's flags touches nothing.
            let open = unsafe { libc::fcntl(raw, libc::F_GETFD) } >= 0;
            // SAFETY: ends the child without running the test harness's exit handlers.
            unsafe { libc::_exit(i32::from(open) + 2 * i32::from(!fd.is_forked())) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made; `status` is a local.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) < 2, "the child knows that it is one");
        libc::WEXITSTATUS(status) == 1
    }

    #[test]
    fn a_forked_child_has_lost_it() {
        install();
        let mut held = registry();
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let fd = LocalFd::new(file, &mut held);
        drop(held);
        assert!(!open_in_child(&fd));
        assert!(fd.get().is_some(), "the parent has it still");
        // Negative control: without the registry the child keeps it.
        registry().clear();
        assert!(open_in_child(&fd));
    }
}
