//! Who has the lock on byte 0: what the header says of it, and what the kernel shows of a process.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use kvmp_core::segment::SegmentHeader;
use rustix::fs::{major, minor};

use crate::error::Holder;
use crate::process::Stat;

/// A server that has just taken the lock has not written its pid yet: so long it is waited for.
const WRITES_ITS_PID: Duration = Duration::from_secs(1);

/// The header of a file, as far as this build can read it.
pub fn read_header(file: &File) -> Option<SegmentHeader> {
    let mut bytes = [0; SegmentHeader::BYTES];
    file.read_exact_at(&mut bytes, 0).ok()?;
    SegmentHeader::parse(&bytes).ok()
}

/// The process that the header names, if it runs and is the one that wrote it: a pid used again must never be taken for
/// a server's.
pub fn named(file: &File) -> Option<u32> {
    let header = read_header(file)?;
    let pid = u32::try_from(header.server_pid).ok().filter(|pid| *pid > 0)?;
    let is_it = |stat: &Stat| stat.start_time == header.server_start && stat.is_running();
    Stat::of(pid).filter(is_it).map(|_| pid)
}

/// What can be said of the server that has the file.
pub fn holder(file: &File) -> Option<Holder> {
    let until = Instant::now() + WRITES_ITS_PID;
    loop {
        if let Some(pid) = named(file) {
            return Some(Holder { pid, stopped: Stat::of(pid).is_some_and(|stat| stat.is_stopped()) });
        }
        if Instant::now() >= until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process holds the exclusive lock on byte 0 of a file; `None` where its descriptors may not be looked at.
pub fn holds(pid: u32, file: &File) -> Option<bool> {
    let meta = file.metadata().ok()?;
    let inode = format!("{:02x}:{:02x}:{}", major(meta.dev()), minor(meta.dev()), meta.ino());
    let all = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fdinfo")).ok()?;
    // A descriptor closed meanwhile is none that holds a lock.
    let texts = all.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
    Some(texts.flat_map(locks).any(|lock| lock == inode))
}

/// Inodes (`MAJOR:MINOR:NUMBER`) on whose byte 0 a descriptor has an exclusive OFD lock, from its `fdinfo`.
fn locks(text: String) -> Vec<String> {
    let exclusive = |line: &str| {
        let fields: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
        match fields[..] {
            [_, "OFDLCK", "ADVISORY", "WRITE", _, inode, "0", "0"] => Some(inode.to_owned()),
            _ => None,
        }
    };
    text.lines().filter_map(exclusive).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::locks::lock_server;

    #[test]
    fn the_holder_of_the_lock_is_told_from_who_only_has_the_file_open() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let own = std::process::id();
        assert_eq!(holds(own, file.as_file()), Some(false));
        assert!(lock_server(file.as_file()).unwrap());
        assert_eq!(holds(own, file.as_file()), Some(true));
        let other = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert_eq!(holds(own, other.as_file()), Some(false), "the lock is another file's");
        assert_eq!(holds(4_194_305, file.as_file()), None, "there is no such process");
    }

    #[test]
    fn a_pid_used_again_is_not_named() {
        let layout = kvmp_core::segment::Layout::new(kvmp_core::geometry::Geometry::new(8 << 20, None).unwrap());
        let mut header = SegmentHeader::new(&layout, kvmp_core::segment::SegmentId([1; 16]), [0; 16], 0);
        let (own, file) = (std::process::id(), tempfile::NamedTempFile::new().unwrap());
        let started = Stat::of(own).unwrap().start_time;
        let mut say = |pid, start| {
            (header.server_pid, header.server_start) = (pid, start);
            file.as_file().write_all_at(zerocopy::IntoBytes::as_bytes(&header), 0).unwrap();
            named(file.as_file())
        };
        assert_eq!(say(u64::from(own), started), Some(own));
        assert_eq!(say(u64::from(own), started - 1), None);
        assert_eq!(say(0, 0), None);
        assert_eq!(say(4_194_305, 0), None);
        // Ended, and not yet reaped.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let stat = || Stat::of(child.id()).unwrap();
        while stat().is_running() {
            std::thread::yield_now();
        }
        assert_eq!(say(u64::from(child.id()), stat().start_time), None);
        child.wait().unwrap();
    }
}
