//! What a process holds, now and at its worst.

use std::time::{Duration, Instant};

use crate::serve::Serve;

/// What a process holds: descriptors, threads, mappings, and memory in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Footprint {
    pub fds: usize,
    pub threads: u64,
    pub maps: usize,
    /// Of its own, to the page: the kernel's running count (`RssAnon`) is some 100 KiB off at times.
    pub own_kib: u64,
    /// The most there ever was, mapped files and all.
    pub peak_kib: u64,
}

/// By how much a process may have grown: what its allocator keeps.
const SLACK_KIB: u64 = 1 << 10;
/// By how much it may have been larger on the way: the ring of a session under way, and lists.
const PEAK_KIB: u64 = 4 << 10;
/// What thousands of rounds may add where as many before them have made all that is made once: less than 30 bytes a round
/// for 5,000.
const LEAK_KIB: u64 = 128;

/// The number of KiB (or of anything) that a file of `/proc` has under a name.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap()
}

impl Footprint {
    /// With a peak of now: what comes counts.
    pub fn from_now(server: &Serve) -> Self {
        std::fs::write(format!("/proc/{}/clear_refs", server.pid()), "5").unwrap();
        Self::of(server)
    }

    pub fn of(server: &Serve) -> Self {
        Self::of_pid(server.pid())
    }

    pub fn of_pid(pid: u32) -> Self {
        let proc = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let status = proc("status");
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        // An allocator's arenas come and go; what is a file's does not by itself.
        let maps = proc("maps").lines().filter(|line| line.contains("kvmp")).count();
        let (own_kib, peak_kib) = (field(&proc("smaps_rollup"), "Anonymous"), field(&status, "VmHWM"));
        Self { fds, threads: field(&status, "Threads"), maps, own_kib, peak_kib }
    }

    /// This footprint was taken when the first rounds were done; now there were as many again.
    pub fn did_not_grow(&self, pid: u32) {
        let now = Self::of_pid(pid);
        assert!(now.own_kib <= self.own_kib + LEAK_KIB, "a little leaks each round: {now:?}, half way {self:?}");
    }

    /// Waits until all is as it was, memory but for a slack, which was never passed on the way either.
    pub fn is_back(&self, server: &Serve) {
        let watchdog = Instant::now() + Duration::from_secs(20);
        loop {
            let now = Self::of(server);
            if (now.fds, now.threads, now.maps) == (self.fds, self.threads, self.maps) {
                assert!(now.own_kib <= self.own_kib + SLACK_KIB, "{now:?}, before {self:?}");
                return assert!(now.peak_kib <= self.peak_kib + PEAK_KIB, "at its worst {now:?}, before {self:?}");
            }
            assert!(Instant::now() < watchdog, "{now:?}, before {self:?}");
            std::thread::yield_now();
        }
    }
}
