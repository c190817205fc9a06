//! `missing -> made under a temporary name -> locked -> renamed`; or `found -> locked -> recovered`.
//!
//! A file is never truncated or re-laid: what does not fit is replaced by a new inode.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use kvmp_core::geometry::Geometry;
use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{Access, Layout, Mapping, SegmentHeader, SegmentId, TableMap};
use rustix::fs::{FallocateFlags, RenameFlags, SeekFrom};

use super::locks::lock_server;
use super::place::{check_folder, check_memory_fs, is_there, not_made, not_opened, segment_path};
use super::server_lock::{holder, read_header};
use super::whole::lost_bytes;
use crate::config::ServerConfig;
use crate::error::{Context, ServerError};
use crate::process::start_time;

/// Recoveries begun and not finished after which the next start is empty.
const RECOVERIES_MAX: u64 = 2;

/// So much of the last chunk that has memory is looked at for holes: no chunk is smaller.
const TAIL: u64 = 2 << 20;

/// What a start found under the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No file: a new one was made.
    Nothing,
    /// A file that fits: its blocks can be recovered.
    Segment,
    /// A file that does not fit, and why; it was replaced by a new one.
    Replaced(String),
}

/// What somebody else may do to the file of a running server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileState {
    /// Nothing.
    AsItWas,
    /// The name is gone; the inode is the server's and its clients' as long as they have it.
    Removed,
    /// The name means another file.
    Replaced,
    /// Bytes are gone that it had: an access to one of them kills.
    Shorter {
        /// Bytes it has.
        bytes: u64,
        /// Bytes it was made with.
        of: u64,
    },
    /// It has its length, but memory is gone that it had: it was shorter in between.
    Hollow,
}

/// The segment file of a running server: locked on byte 0, its table mapped.
#[derive(Debug)]
pub struct SegmentFile {
    path: PathBuf,
    file: File,
    /// Table (header, words, records), mapped for reading and writing.
    pub table: TableMap,
    /// What was there before.
    pub found: Found,
    severed: AtomicBool,
    /// Up to where chunks were seen to have all their memory.
    whole_to: AtomicU64,
}

fn open_rw(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

fn boot_id() -> Result<[u8; 16], ServerError> {
    kvmp_core::segment::boot_id().doing(|| "reading the kernel's boot id".into())
}

/// Random bytes from the kernel.
fn random<const N: usize>() -> Result<[u8; N], ServerError> {
    let mut bytes = [0; N];
    File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).doing(|| "reading /dev/urandom".into())?;
    Ok(bytes)
}

/// Nanoseconds since boot, suspend included: no clock jump changes it.
#[must_use]
pub fn boot_clock_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// What an attempt to lock the file of a name came to.
enum Locked {
    /// There is no file.
    Nothing,
    Mine(File),
    /// A server has it.
    Taken(File),
}

/// Opens what is under the path and locks it.
fn lock_existing(path: &Path) -> Result<Locked, ServerError> {
    while is_there(path)? {
        let file = match open_rw(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Locked::Nothing),
            other => other.map_err(|e| not_opened(path, e))?,
        };
        if !lock_server(&file).doing(|| format!("locking {}", path.display()))? {
            return Ok(Locked::Taken(file));
        }
        // Replaced between open and lock: then the lock is on a file that nobody will find again.
        let mine = file.metadata().doing(|| format!("asking for {}", path.display()))?;
        match fs::symlink_metadata(path) {
            Ok(now) if (now.dev(), now.ino()) == (mine.dev(), mine.ino()) => return Ok(Locked::Mine(file)),
            _ => {}
        }
    }
    Ok(Locked::Nothing)
}

/// Why a locked file cannot be gone on with; `Ok` gives its layout.
fn fits(file: &File, config: &ServerConfig, wanted: Geometry) -> Result<Layout, String> {
    if config.fresh {
        return Err("--fresh was given".into());
    }
    let meta = file.metadata().map_err(|e| e.to_string())?;
    if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(format!("it belongs to uid {} with mode {:o}", meta.uid(), meta.mode() & 0o777));
    }
    let header = read_header(file).ok_or("it has no kvmp header")?;
    let layout = header.check(meta.len(), boot_id().map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    if layout.geometry != wanted {
        return Err(format!(
            "it has {} chunks of {}, wanted are {} of {}",
            layout.geometry.chunks,
            crate::size::Bytes(layout.geometry.chunk_bytes),
            wanted.chunks,
            crate::size::Bytes(wanted.chunk_bytes)
        ));
    }
    if header.recoveries_begun >= RECOVERIES_MAX {
        return Err(format!("{} recoveries in a row did not finish", header.recoveries_begun));
    }
    Ok(layout)
}

/// What a start is told whose name another server has.
pub fn name_taken(config: &ServerConfig, file: &File) -> ServerError {
    ServerError::NameTaken { name: config.name.clone(), holder: holder(file) }
}

/// A name that is this server's: its old file, if there was one, is locked, and nothing was changed yet.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    geometry: Geometry,
    file: File,
    found: Found,
}

impl Claim {
    /// Finds and locks the segment of a configuration, or makes it where there is none.
    pub fn new(config: &ServerConfig, geometry: Geometry) -> Result<Self, ServerError> {
        Self::try_new(config, geometry)?.map_err(|taken| name_taken(config, &taken))
    }

    /// As `new`; the file, if a server has it.
    pub fn try_new(config: &ServerConfig, geometry: Geometry) -> Result<Result<Self, File>, ServerError> {
        check_memory_fs(&config.arena_dir)?;
        let path = segment_path(&config.arena_dir, &config.name);
        loop {
            let (file, found) = match lock_existing(&path)? {
                Locked::Taken(file) => return Ok(Err(file)),
                Locked::Mine(file) => {
                    let found = fits(&file, config, geometry).map_or_else(Found::Replaced, |_| Found::Segment);
                    (file, found)
                }
                Locked::Nothing => match make(&path, geometry, false)? {
                    Some(file) => (file, Found::Nothing),
                    None => continue,
                },
            };
            return Ok(Ok(Self { path, geometry, file, found }));
        }
    }

    /// A file that has lost memory of its chunks does not fit either.
    pub fn with_memory(mut self) -> Result<Self, ServerError> {
        if self.found == Found::Segment {
            let lost = lost_bytes(&self.file, &Layout::new(self.geometry));
            match lost.doing(|| format!("looking at the memory of {}", self.path.display()))? {
                0 => {}
                lost => self.found = Found::Replaced(format!("it has lost {} of its memory", crate::size::Bytes(lost))),
            }
        }
        Ok(self)
    }

    /// Goes on with the file, or with a new one in its place. The old one's lock is held until the new one has its name.
    pub fn open(self) -> Result<SegmentFile, ServerError> {
        let Self { path, geometry, file, found } = self;
        let file = match found {
            Found::Replaced(_) => make(&path, geometry, true)?.ok_or_else(|| ServerError::Segment {
                path: path.clone(),
                why: "another process took its name; start again".into(),
            })?,
            Found::Nothing | Found::Segment => file,
        };
        SegmentFile::take_over(path, file, geometry, found)
    }

    /// The start failed before it came to `open`: a file made for it goes, one that was there stays.
    pub fn give_up(self) {
        if self.found == Found::Nothing {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl SegmentFile {
    fn take_over(path: PathBuf, file: File, geometry: Geometry, found: Found) -> Result<Self, ServerError> {
        let layout = Layout::new(geometry);
        let map = Mapping::new(&file, 0, layout.table_bytes(), Access::ReadWrite)
            .doing(|| format!("mapping {}", path.display()))?;
        let table = TableMap::new(map, layout);
        let mut header = table
            .header()
            .ok_or_else(|| ServerError::Segment { path: path.clone(), why: "its header is unreadable".into() })?;
        header.server_epoch = u64::from_le_bytes(random::<8>()?) >> 1 | 1;
        header.server_pid = u64::from(std::process::id());
        header.server_start = start_time(std::process::id());
        table.set_header(&header);
        Ok(Self { path, file, table, found, severed: AtomicBool::new(false), whole_to: AtomicU64::new(0) })
    }

    /// Notes that recovery begins; one that never ends is seen by the next start.
    pub fn recovering(&self) {
        self.count_recoveries(|begun| begun + 1);
    }

    /// Notes that recovery went through.
    pub fn recovered(&self) {
        self.count_recoveries(|_| 0);
    }

    fn count_recoveries(&self, count: impl FnOnce(u64) -> u64) {
        if let Some(mut header) = self.table.header() {
            header.recoveries_begun = count(header.recoveries_begun);
            self.table.set_header(&header);
        }
    }

    /// Path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The server's own descriptor.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A new open file description of this very inode, also when the name has gone.
    pub fn reopen(&self, write: bool) -> io::Result<OwnedFd> {
        use std::os::fd::AsRawFd;
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(OpenOptions::new().read(true).write(write).open(own)?.into())
    }

    /// Lets go of the file for good: whatever the table is asked from here on, it reads and writes private zeroes. What
    /// was worked out of them must not be told to anybody: `is_severed`.
    pub fn sever(&self) -> io::Result<()> {
        // Before the first such page is there.
        self.severed.store(true, Ordering::SeqCst);
        self.table.sever()
    }

    /// Whether the file was let go of, as far as that can matter to what this thread has done with the table so far: where
    /// it answers no, all of that was done in the file.
    ///
    /// An access that met a private page did so after the kernel had taken the file's pages out of the page table and had
    /// heard of every core that it had forgotten them (the shootdown ends before `sever`'s mmap puts a page there), so
    /// after the flag was set and seen. The fence keeps this thread's accesses, stores too, before its look at the flag.
    #[must_use]
    pub fn is_severed(&self) -> bool {
        fence(Ordering::SeqCst);
        self.severed.load(Ordering::SeqCst)
    }

    /// What has become of the file since it was made or found.
    #[must_use]
    pub fn state(&self) -> FileState {
        // Before its length: one that is made shorter just now is seen to be so.
        let is_whole = self.is_whole_before(self.whole_to.load(Ordering::Relaxed));
        let own = self.file.metadata();
        let of = self.table.layout().file_bytes();
        match (&own, fs::symlink_metadata(&self.path)) {
            (Ok(own), _) if own.len() < of => FileState::Shorter { bytes: own.len(), of },
            _ if !is_whole => FileState::Hollow,
            (Ok(own), Ok(named)) if (own.dev(), own.ino()) != (named.dev(), named.ino()) => FileState::Replaced,
            (_, Err(e)) if e.kind() == io::ErrorKind::NotFound => FileState::Removed,
            _ => FileState::AsItWas,
        }
    }

    /// Told of chunks that have their memory. From then on no page of them is ever a hole again, for they were written
    /// to, unless the file is made shorter: that takes the last of them first.
    pub fn has_memory(&self, chunk: ChunkId) {
        let (at, bytes) = self.table.layout().chunk(chunk);
        // Linux before 5.14 has holes there until they are touched: then this file cannot be watched that way.
        if self.is_whole_before(at + bytes) {
            self.whole_to.fetch_max(at + bytes, Ordering::Relaxed);
        }
    }

    /// Whether there is no hole just before an offset. A file system that does not know (hugetlbfs) says that all is data.
    fn is_whole_before(&self, end: u64) -> bool {
        let from = SeekFrom::Hole(end.saturating_sub(TAIL));
        let hole = || rustix::fs::seek(&self.file, from).ok().filter(|hole| *hole < end);
        let Some(at) = hole() else { return true };
        // Linux before 6.4 shows a hole where it is just making small pages into a huge one. A read waits until that is
        // done, and fills no hole.
        let _ = rustix::io::pread(&self.file, &mut [0; 1], at);
        hole().is_none()
    }

    /// Bytes of memory the file takes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |meta| meta.blocks() * 512)
    }

    /// Unlinks the file, if the name still means this inode, whatever has become of that.
    pub fn unlink(&self) {
        let named = fs::symlink_metadata(&self.path);
        if let (Ok(own), Ok(named)) = (self.file.metadata(), named)
            && (own.dev(), own.ino()) == (named.dev(), named.ino())
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a new file and gives it its name. `None`: someone else was faster.
fn make(path: &Path, geometry: Geometry, replace: bool) -> Result<Option<File>, ServerError> {
    let layout = Layout::new(geometry);
    let temporary = path.with_extension(format!("kvmp.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let made = fill_new(&temporary, &layout).and_then(|file| {
        if !lock_server(&file).doing(|| format!("locking {}", temporary.display()))? {
            return Ok(None);
        }
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let at = rustix::fs::CWD;
        match rustix::fs::renameat_with(at, &temporary, at, path, flags) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::EXIST) => Ok(None),
            Err(e) => Err(e).doing(|| format!("naming {}", path.display())),
        }
    });
    if !matches!(made, Ok(Some(_))) {
        let _ = fs::remove_file(&temporary);
    }
    made
}

fn fill_new(path: &Path, layout: &Layout) -> Result<File, ServerError> {
    let header = SegmentHeader::new(layout, SegmentId(random()?), boot_id()?, boot_clock_ns());
    let file = make_backed(path, layout).map_err(|e| not_made(path, layout, e))?;
    // Through a mapping: a hugetlbfs takes no writes.
    let map = Mapping::new(&file, 0, layout.table_bytes(), Access::ReadWrite)
        .doing(|| format!("mapping {}", path.display()))?;
    TableMap::new(map, *layout).set_header(&header);
    Ok(file)
}

/// A file of its length, with memory behind what the server writes before any chunk is backed.
fn make_backed(path: &Path, layout: &Layout) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(layout.file_bytes())?;
    for (offset, len) in layout.always_backed() {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), offset, len)?;
    }
    Ok(file)
}

/// Bytes of the arena that a server of this name would find and go on with; `None` where there is none, or it is not ours.
#[must_use]
pub fn kept_arena_bytes(dir: &Path, name: &str) -> Option<u64> {
    let file = open_rw(&segment_path(dir, name)).ok()?;
    let layout = read_header(&file)?.check(file.metadata().ok()?.len(), boot_id().ok()?).ok()?;
    Some(layout.geometry.arena_bytes())
}

/// Removes the segment file of a name (`kvmp rm`); refused while a server has it. Gives the bytes it took.
pub fn remove(dir: &Path, name: &str) -> Result<u64, ServerError> {
    check_folder(dir)?;
    let path = segment_path(dir, name);
    match lock_existing(&path)? {
        Locked::Nothing => Err(ServerError::Segment {
            path,
            why: "there is none; `ls` shows the folder, --arena-dir names another".into(),
        }),
        Locked::Taken(file) => Err(ServerError::SegmentInUse { path, holder: holder(&file) }),
        Locked::Mine(file) => {
            let bytes = file.metadata().map_or(0, |meta| meta.blocks() * 512);
            fs::remove_file(&path).doing(|| format!("removing {}", path.display()))?;
            Ok(bytes)
        }
    }
}
