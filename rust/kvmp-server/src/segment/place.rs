//! Where a segment is to lie: what its folder must be, and what may be there under its name.

use std::fs::{self, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kvmp_core::segment::Layout;

use crate::error::{Context, ServerError};
use crate::limits::{Sources, bounds, tightest_free};

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Path of the segment of a name.
pub fn segment_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.kvmp"))
}

/// Refuses what is no folder.
pub fn check_folder(dir: &Path) -> Result<(), ServerError> {
    let refused = |why: &str| ServerError::Config {
        key: format!("--arena-dir {}", dir.display()),
        why: format!("{why}; make it, or name another folder of a tmpfs or hugetlbfs, such as /dev/shm"),
    };
    match fs::metadata(dir) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(refused("is no folder")),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(refused("there is no such folder"))
        }
        other => other.map(drop).doing(|| format!("--arena-dir {}", dir.display())),
    }
}

/// Whether a folder's file system is in memory.
#[must_use]
pub fn lies_in_memory(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|stat| [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&(stat.f_type as u64)))
}

/// Refuses a folder that is not in memory.
pub fn check_memory_fs(dir: &Path) -> Result<(), ServerError> {
    check_folder(dir)?;
    rustix::fs::statfs(dir).doing(|| format!("--arena-dir {}", dir.display()))?;
    if lies_in_memory(dir) { Ok(()) } else { Err(ServerError::NotMemory { dir: dir.to_owned() }) }
}

/// Whether there is something under a segment's name; what is no file is refused.
pub fn is_there(path: &Path) -> Result<bool, ServerError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => Ok(true),
        Ok(found) => Err(ServerError::Segment {
            path: path.to_owned(),
            why: format!(
                "{} is in its place; remove it, or take another --name or --arena-dir",
                kind(found.file_type())
            ),
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).doing(|| format!("asking for {}", path.display())),
    }
}

fn kind(found: FileType) -> &'static str {
    match found {
        it if it.is_symlink() => "a symbolic link",
        it if it.is_dir() => "a folder",
        it if it.is_socket() => "a socket",
        it if it.is_fifo() => "a named pipe",
        _ => "a device",
    }
}

/// What the failure to open a segment that is there means.
pub fn not_opened(path: &Path, error: io::Error) -> ServerError {
    let own = rustix::process::geteuid().as_raw();
    match fs::symlink_metadata(path) {
        Ok(found) if error.kind() == io::ErrorKind::PermissionDenied => ServerError::Segment {
            path: path.to_owned(),
            why: format!(
                "it belongs to uid {}, and this process, of uid {own}, may not open it; take another --name or --arena-dir",
                found.uid()
            ),
        },
        _ => ServerError::Os { what: format!("opening {}", path.display()), source: error },
    }
}

/// What the failure to make a segment means: where memory has run out, how much is needed and what gives it.
pub fn not_made(path: &Path, layout: &Layout, error: io::Error) -> ServerError {
    use io::ErrorKind::{OutOfMemory, QuotaExceeded, StorageFull};
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    let all = bounds(&dir, &Sources::default());
    match tightest_free(&all) {
        Some(bound) if matches!(error.kind(), StorageFull | QuotaExceeded | OutOfMemory) => ServerError::NoRoomAtAll {
            needed: smallest_bytes(layout),
            what: bound.what.clone(),
            free: bound.free,
            mend: bound.mend.clone(),
            dir,
        },
        _ => ServerError::Os { what: format!("making {}", path.display()), source: error },
    }
}

/// Bytes of a segment with one chunk backed: with less no block can be kept.
fn smallest_bytes(layout: &Layout) -> u64 {
    let always: u64 = layout.always_backed().iter().map(|(_, len)| len).sum();
    always + layout.geometry.chunk_table_bytes() + layout.geometry.chunk_bytes
}
