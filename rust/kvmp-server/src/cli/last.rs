//! What a process says last. A standard error that nobody reads must not keep it from ending.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long the end waits for a reader.
pub(super) const LAST_LINES: Duration = Duration::from_millis(500);
/// A pipe that has room at all takes as many bytes without a wait.
const PIECE: usize = 4096;

/// Writes bytes to standard error as long as there is room within `limit`; the rest is lost. Calls nothing that may not
/// be called in a signal handler.
///
/// Another thread that has waited for the same room may take it between the look and the write: for that, a reader must
/// come back in this very moment, and leave again.
pub(super) fn say_last(text: &[u8], limit: Duration) {
    let stderr = std::io::stderr();
    let stderr = stderr.as_fd();
    let mut rest = text;
    while !rest.is_empty() && has_room(stderr, limit) {
        match rustix::io::write(stderr, &rest[..rest.len().min(PIECE)]) {
            Ok(written) => rest = &rest[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

fn has_room(stderr: BorrowedFd<'_>, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    let mut fds = [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)];
    let looked = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&limit)));
    looked.is_ok() && fds[0].revents().contains(PollFlags::OUT)
}
