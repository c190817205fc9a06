//! A fork in the middle of a hello. In a file of its own: the child keeps what other tests of this process have open.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

#[allow(dead_code, reason = "shared with tests that need more of it")]
mod fake;

use std::os::fd::{AsRawFd, OwnedFd};

use fake::{GENEROUS, Listener};
use kvmp_client::{Bound, Client, ClientError, ConnectOptions};
use kvmp_core::wire::{Refusal, Role, ServerMessage, send};
use rustix::event::{PollFd, PollFlags, poll};

/// A child that has what a fork leaves open, and does nothing.
struct Sleeper(libc::pid_t);

impl Sleeper {
    /// `not` is closed in the child, so that only the client's end can keep the connection up.
    fn fork(not: &OwnedFd) -> Self {
        // SAFETY: the child makes system calls that are safe after a fork, and never returns.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: in the child, whose copy of the descriptor nobody uses.
            unsafe { libc::close(not.as_raw_fd()) };
            loop {
                // SAFETY: waits for the signal that ends the child.
                unsafe { libc::pause() };
            }
        }
        Self(pid)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: signals the child just made, which is not waited for yet.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: waits for that child; no status is asked for.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

fn hung_up(socket: &OwnedFd, within_s: i64) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: within_s, tv_nsec: 0 })).unwrap() == 1
}

#[test]
fn a_child_forked_during_the_hello_keeps_no_socket() {
    let listener = Listener::new();
    let endpoint = listener.endpoint();
    let options = ConnectOptions::new(Role::Scheduler);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| Client::connect(&endpoint, &options, &Bound::ms(GENEROUS)));
        let server = listener.greeted();
        let _child = Sleeper::fork(&server);
        assert!(!hung_up(&server, 0));
        let refused = ServerMessage::Refused { refusal: Refusal::Protocol, message: "no".into() };
        send(&server, &refused, &[]).unwrap();
        assert!(matches!(client.join().unwrap(), Err(ClientError::Refused { .. })));
        // A watchdog's time: the child closes its copy when it first runs, which a busy machine puts off.
        assert!(hung_up(&server, 20), "the client's end is closed, and the child has none");
    });
}
