//! OFD locks on ranges of a file, which belong to an open file description: they last until its last descriptor is closed.
//!
//! Never POSIX record locks: those drop when any descriptor of the file is closed.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Who else may lock the same bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockKind {
    /// Whoever only reads.
    Shared,
    /// Nobody.
    Exclusive,
}

impl LockKind {
    fn code(self) -> libc::c_short {
        let code = match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
        };
        code as libc::c_short
    }
}

fn flock(kind: LockKind, from: u64, len: u64) -> libc::flock {
    // SAFETY: `flock` is plain old data; all zeroes is a value of it (and l_pid must be 0 for OFD locks).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind.code();
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = from as libc::off_t;
    lock.l_len = len as libc::off_t;
    lock
}

/// Locks `[from, from + len)` without waiting; `false` when someone else's lock stands against it.
pub fn try_lock(file: impl AsFd, kind: LockKind, from: u64, len: u64) -> io::Result<bool> {
    let lock = flock(kind, from, len);
    // SAFETY: the descriptor is open for the call, `lock` is a valid flock that the kernel only reads.
    let done = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        e => Err(e),
    }
}

/// First offset in `[from, from + len)` that someone else has locked in any way.
pub fn first_locked(file: impl AsFd, from: u64, len: u64) -> io::Result<Option<u64>> {
    let mut lock = flock(LockKind::Exclusive, from, len);
    // SAFETY: the descriptor is open for the call, `lock` is a valid flock that the kernel reads and writes.
    let done = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((libc::c_int::from(lock.l_type) != libc::F_UNLCK).then_some((lock.l_start as u64).max(from)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_range_is_locked_by_all_its_bytes_and_only_for_others() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let [own, reads, writes] = [open(), open(), open()];
        assert!(try_lock(&own, LockKind::Shared, 10, 5).unwrap());
        assert_eq!(first_locked(&own, 0, 100).unwrap(), None);
        assert_eq!(
            (first_locked(&writes, 0, 100).unwrap(), first_locked(&writes, 12, 9).unwrap()),
            (Some(10), Some(12))
        );
        assert_eq!((first_locked(&writes, 0, 10).unwrap(), first_locked(&writes, 15, 9).unwrap()), (None, None));
        assert!(try_lock(&reads, LockKind::Shared, 10, 1).unwrap());
        assert!(!try_lock(&writes, LockKind::Exclusive, 14, 9).unwrap());
        drop((own, reads));
        assert!(try_lock(&writes, LockKind::Exclusive, 10, 5).unwrap());
    }
}
