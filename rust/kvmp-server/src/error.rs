//! Why a server does not start, or stops.

use std::path::PathBuf;

use kvmp_core::geometry::GeometryError;

use crate::size::Bytes;

/// The server that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// Stopped by a signal (SIGSTOP, Ctrl-Z): it does nothing, and what it has stays its own.
    pub stopped: bool,
}

fn who(holder: Option<&Holder>) -> String {
    match holder {
        Some(Holder { pid, stopped: false }) => format!("pid {pid}"),
        Some(Holder { pid, stopped: true }) => format!("pid {pid}, which a signal has stopped"),
        None => "whose pid cannot be told from here".into(),
    }
}

fn mend(holder: Option<&Holder>) -> String {
    match holder {
        Some(Holder { pid, stopped: false }) => format!("stop it with `kill {pid}`"),
        Some(Holder { pid, stopped: true }) => format!("let it go on with `kill -CONT {pid}`"),
        None => "stop it where it runs (another container?)".into(),
    }
}

/// Everything that keeps a server from running.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A setting that cannot be.
    #[error("{key}: {why}")]
    Config {
        /// Flag or key.
        key: String,
        /// What is wrong with it, and what is allowed.
        why: String,
    },
    /// Sizes that do not fit each other.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// More than there could ever be.
    #[error("--size {} could never fit: {what} has {} in all; {mend}, or ask for less with --size", Bytes(*size), Bytes(*total))]
    NeverFits {
        /// Bytes the segment would take.
        size: u64,
        /// What is too small.
        what: String,
        /// How much it has in all.
        total: u64,
        /// What makes it larger.
        mend: String,
    },
    /// Not even one chunk has room.
    #[error("no room for even one chunk of {}: {what} has {} free; {mend}, or take a smaller --chunk", Bytes(*chunk), Bytes(*free))]
    NoRoom {
        /// Bytes of a chunk.
        chunk: u64,
        /// What is full.
        what: String,
        /// How much it has free.
        free: u64,
        /// What makes room.
        mend: String,
    },
    /// Not even the smallest segment has room.
    #[error(
        "no room for a segment in {}: {} are needed to begin with, and {what} has {} free; {mend}, take another \
         --arena-dir, or a smaller --size, whose chunks are smaller", dir.display(), Bytes(*needed), Bytes(*free)
    )]
    NoRoomAtAll {
        /// The arena dir.
        dir: PathBuf,
        /// Bytes of a segment with one chunk backed.
        needed: u64,
        /// What is full.
        what: String,
        /// How much it has free.
        free: u64,
        /// What makes room.
        mend: String,
    },
    /// The arena dir is on a disk, say.
    #[error("--arena-dir {}: not a tmpfs or hugetlbfs; memory speed needs one (/dev/shm is a tmpfs)", dir.display())]
    NotMemory {
        /// The folder.
        dir: PathBuf,
    },
    /// Another server has the name.
    #[error(
        "a kvmp server ({}) already runs under the name '{name}'; {}, take over from it with --upgrade, or take another \
         --name", who(holder.as_ref()), mend(holder.as_ref())
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it, as far as that can be told.
        holder: Option<Holder>,
    },
    /// A running server was to be taken over from, and that did not work out.
    #[error("--upgrade: {0}")]
    Upgrade(String),
    /// The start was given up while it waited for a running server.
    #[error("{why}: stopping; {left}")]
    GivenUp {
        /// What made it give up, as in SIGTERM.
        why: String,
        /// What becomes of the running server.
        left: String,
    },
    /// A segment is to be removed that a server has.
    #[error("segment {}: a kvmp server ({}) has it; {} first", path.display(), who(holder.as_ref()), mend(holder.as_ref()))]
    SegmentInUse {
        /// Path of the file.
        path: PathBuf,
        /// Who has it, as far as that can be told.
        holder: Option<Holder>,
    },
    /// The TCP port that was asked for is taken.
    #[error("--tcp {address}: {why}; take another port, or `--tcp off`")]
    Tcp {
        /// Address asked for.
        address: String,
        /// The system's reason.
        why: String,
    },
    /// A folder or socket that is not ours alone.
    #[error("{}: {why}", path.display())]
    Socket {
        /// Path of folder or socket.
        path: PathBuf,
        /// What is wrong, and the mend.
        why: String,
    },
    /// A running server was asked for something and it did not work out.
    #[error("{0}")]
    Asked(String),
    /// A command that is Python's.
    #[error(
        "this is the native binary; `kvmp {command}` comes with the Python wheel: run the `kvmp` of the environment that the \
         wheel is installed in"
    )]
    InWheel {
        /// The command.
        command: &'static str,
    },
    /// A segment file that cannot be used or is not there.
    #[error("segment {}: {why}", path.display())]
    Segment {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it, and the mend.
        why: String,
    },
    /// Somebody made the segment of a running server shorter.
    #[error(
        "segment {}: it was made shorter from outside, to {} of {}; whoever still touches the rest is killed (SIGBUS), so the \
         server ends; start it again, on a new segment", path.display(), Bytes(*bytes), Bytes(*of)
    )]
    Shortened {
        /// Path of the file.
        path: PathBuf,
        /// Bytes it has.
        bytes: u64,
        /// Bytes it was made with.
        of: u64,
    },
    /// Somebody made the segment of a running server shorter and longer again, or punched a hole into its end.
    #[error(
        "segment {}: memory at its end is gone: it was made shorter and longer again from outside, or a hole was punched \
         there; what lay there is zeroes now, so the segment is removed and the server ends; start it again, on a new segment",
        path.display()
    )]
    Hollow {
        /// Path of the file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was being done.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl ServerError {
    /// The exit status of the command line: 2 for what the caller asked wrongly, 1 for the rest.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Config { .. }
            | Self::Geometry(_)
            | Self::NeverFits { .. }
            | Self::NotMemory { .. }
            | Self::InWheel { .. } => 2,
            _ => 1,
        }
    }
}

/// Puts words before a system error.
pub(crate) trait Context<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, ServerError>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, ServerError> {
        self.map_err(|source| ServerError::Os { what: what(), source: source.into() })
    }
}
