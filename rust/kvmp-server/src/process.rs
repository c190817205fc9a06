//! Another process, watched until it ends: `running -> ended`. A pid used again is never taken for it.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use crate::error::ServerError;

/// A process that was running when it was first looked at.
#[derive(Debug)]
pub struct WatchedProcess {
    pid: u32,
    by: By,
}

/// How its end is seen.
#[derive(Debug)]
enum By {
    /// Becomes readable with its end.
    PidFd(OwnedFd),
    /// Where there are no pidfds: its start time in clock ticks since boot, which a later process of its pid has not. A
    /// signal goes to the pid then: were the process to end between the look and the signal, and its pid be given to
    /// another one in that very moment, that one would be meant.
    StartTime(u64),
}

/// Why a process cannot be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unwatchable {
    #[error("is the server itself; give the pid of the process whose end is to end the server")]
    Itself,
    #[error("is no process id; they go from 1 to 2147483647")]
    NoPid,
    #[error("there is no such process; give the pid of one that runs, in this pid namespace")]
    NoSuch,
    #[error("opening a pidfd: {0}")]
    System(std::io::Error),
}

impl WatchedProcess {
    /// Begins to watch a process.
    ///
    /// # Errors
    /// A configuration error that names `--until-pid` where there is no such process, or it is this one.
    pub fn open(pid: u32) -> Result<Self, ServerError> {
        Self::watch(pid).map_err(|why| until_pid(pid, why))
    }

    /// As `open`, for a process that no setting names.
    pub(crate) fn watch(pid: u32) -> Result<Self, Unwatchable> {
        let wanted = checked(pid)?;
        match pidfd_open(wanted, PidfdFlags::empty()) {
            Ok(fd) => Ok(Self { pid, by: By::PidFd(fd) }),
            // Old kernels, and sandboxes that answer calls they do not know with EPERM.
            Err(Errno::NOSYS | Errno::PERM) => Self::by_start_time(pid),
            // EINVAL and ENOENT: the number is that of a thread.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Err(Unwatchable::NoSuch),
            Err(e) => Err(Unwatchable::System(e.into())),
        }
    }

    fn by_start_time(pid: u32) -> Result<Self, Unwatchable> {
        let found = Stat::of(pid).filter(Stat::is_running).ok_or(Unwatchable::NoSuch)?;
        Ok(Self { pid, by: By::StartTime(found.start_time) })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether a signal has stopped it.
    pub(crate) fn is_stopped(&self) -> bool {
        Stat::of(self.pid).is_some_and(|stat| stat.is_stopped())
    }

    /// Asks it to end. One that has ended needs no asking.
    pub(crate) fn terminate(&self) -> std::io::Result<()> {
        let sent = match &self.by {
            By::PidFd(fd) => pidfd_send_signal(fd, Signal::TERM),
            By::StartTime(_) if self.ends_within(Duration::ZERO) => return Ok(()),
            By::StartTime(_) => checked(self.pid).map_or(Ok(()), |pid| kill_process(pid, Signal::TERM)),
        };
        match sent {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The words for its end, once it has ended.
    pub(crate) fn has_ended(&self) -> Option<String> {
        self.ends_within(Duration::ZERO).then(|| format!("process {} ended", self.pid))
    }

    /// Whether it has ended; waits for that, at most `limit` and no longer than until a signal comes.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        match &self.by {
            By::PidFd(fd) => is_readable(fd, limit),
            By::StartTime(start) => {
                let ended = || !Stat::of(self.pid).is_some_and(|now| now.start_time == *start && now.is_running());
                ended() || {
                    std::thread::sleep(limit);
                    ended()
                }
            }
        }
    }
}

fn until_pid(pid: u32, why: Unwatchable) -> ServerError {
    match why {
        Unwatchable::System(source) => ServerError::Os { what: format!("--until-pid {pid}: opening a pidfd"), source },
        why => ServerError::Config { key: format!("--until-pid {pid}"), why: why.to_string() },
    }
}

fn checked(pid: u32) -> Result<Pid, Unwatchable> {
    if pid == std::process::id() {
        return Err(Unwatchable::Itself);
    }
    i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Unwatchable::NoPid)
}

fn is_readable(fd: &OwnedFd, limit: Duration) -> bool {
    // A limit that a Timespec cannot hold is for ever.
    let limit = Timespec::try_from(limit).ok();
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, limit.as_ref()).is_ok_and(|ready| ready > 0)
}

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    state: String,
    threads: u64,
    /// In clock ticks since boot.
    pub start_time: u64,
}

impl Stat {
    /// Of a process, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Fields 3, 20 and 22. Field 2, the name, may hold blanks and brackets: the others lie behind its last bracket.
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse().ok();
        Some(Self { state: (*fields.first()?).to_owned(), threads: number(17)?, start_time: number(19)? })
    }

    /// Whether a signal has stopped it, until SIGCONT.
    pub fn is_stopped(&self) -> bool {
        self.state == "T"
    }

    /// A main thread that has ended before the others is a zombie of a process that still runs.
    pub fn is_running(&self) -> bool {
        !matches!(self.state.as_str(), "Z" | "X" | "x") || self.threads > 1
    }
}

/// Start time of a process in clock ticks since boot; 0 where it is not known.
#[must_use]
pub fn start_time(pid: u32) -> u64 {
    Stat::of(pid).map_or(0, |stat| stat.start_time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// Waits on standard input for ever.
    fn child() -> Child {
        Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap()
    }

    fn watch<E: std::fmt::Debug>(open: fn(u32) -> Result<WatchedProcess, E>) {
        let mut child = child();
        let watched = open(child.id()).unwrap();
        assert_eq!(watched.pid(), child.id());
        assert!(!watched.ends_within(Duration::ZERO));
        child.kill().unwrap();
        let watchdog = std::time::Instant::now() + Duration::from_secs(20);
        // Not reaped yet: its zombie has ended all the same.
        while !watched.ends_within(Duration::from_millis(10)) {
            assert!(std::time::Instant::now() < watchdog, "its end was never seen");
        }
        child.wait().unwrap();
        assert!(watched.ends_within(Duration::ZERO));
        assert!(open(child.id()).is_err());
    }

    #[test]
    fn an_end_is_seen() {
        watch(WatchedProcess::open);
    }

    #[test]
    fn an_end_is_seen_without_pidfds() {
        watch(WatchedProcess::by_start_time);
    }

    #[test]
    fn another_process_of_the_same_pid_is_not_taken_for_it() {
        let mut child = child();
        let start = start_time(child.id());
        let earlier = WatchedProcess { pid: child.id(), by: By::StartTime(start - 1) };
        let same = WatchedProcess { pid: child.id(), by: By::StartTime(start) };
        assert!(earlier.ends_within(Duration::ZERO) && !same.ends_within(Duration::ZERO));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_cannot_be_watched_is_refused_by_name() {
        for (pid, why) in
            [(0, "no process id"), (u32::MAX, "no process id"), (std::process::id(), "itself"), (4_194_305, "no such")]
        {
            let error = WatchedProcess::open(pid).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            assert!(text.starts_with(&format!("--until-pid {pid}: ")) && text.contains(why), "{text}");
        }
    }

    #[test]
    fn a_name_with_brackets_hides_no_field() {
        let text = "7 (a) b (c)) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 1 18 990 20";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat, Stat { state: "Z".into(), threads: 1, start_time: 990 });
        assert!(!stat.is_running() && Stat { threads: 2, ..stat }.is_running());
        assert_eq!(Stat::parse("7 (a) S 1"), None);
    }
}
