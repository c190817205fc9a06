//! The unix socket: its folder, its binding under a temporary name, its end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kvmp_core::wire::peer_uid;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Context, ServerError};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A listening `SOCK_SEQPACKET` socket, under its name until dropped.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    pub fd: OwnedFd,
    path: PathBuf,
    inode: (u64, u64),
}

fn refuse(path: &Path, why: impl Into<String>) -> ServerError {
    ServerError::Socket { path: path.to_owned(), why: why.into() }
}

/// Who may connect, as far as the file system decides: with others only asked by their uid once they have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Doors {
    /// The server's own user, and root.
    Own,
    /// Anybody: `--allow-uid` names users that the socket's mode cannot name.
    Open,
}

impl Doors {
    fn socket_mode(self) -> u32 {
        if self == Self::Own { 0o600 } else { 0o666 }
    }

    fn folder_mode(self) -> u32 {
        if self == Self::Own { 0o700 } else { 0o711 }
    }
}

/// Says so where a folder keeps out whom `--allow-uid` lets in.
fn warn_of_closed_folders(path: &Path) {
    let closed = |dir: &&Path| fs::metadata(dir).is_ok_and(|meta| meta.mode() & 0o001 == 0);
    if let Some(dir) = path.ancestors().skip(1).find(closed) {
        tracing::warn!(
            "{} keeps other users out, those of --allow-uid too; let them through with `chmod o+x {}`, or take another \
             --socket",
            dir.display(),
            dir.display()
        );
    }
}

/// The folder, made if it is missing; another user's folder is refused.
fn folder(path: &Path, doors: Doors) -> Result<(), ServerError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    };
    if !dir.exists() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(doors.folder_mode())
            .create(&dir)
            .doing(|| format!("making {}", dir.display()))?;
    }
    let meta = fs::symlink_metadata(&dir).doing(|| format!("asking for {}", dir.display()))?;
    let own = rustix::process::geteuid().as_raw();
    if dir.starts_with("/tmp/")
        && dir.file_name().is_some_and(|n| n.to_string_lossy() == format!("kvmp-{own}"))
        && meta.uid() != own
    {
        return Err(refuse(
            &dir,
            format!("belongs to uid {}, not to {own}; remove it or take another --socket", meta.uid()),
        ));
    }
    Ok(())
}

/// What lies under the name may be replaced only if it is a socket that nobody answers any more: holding the segment of
/// one name says nothing of a server of another name on this path.
fn check_free(path: &Path) -> Result<(), ServerError> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    if !meta.file_type().is_socket() {
        return Err(refuse(path, "is there and is no socket; take another --socket"));
    }
    match dial(path) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // EAGAIN: somebody listens and has his hands full.
        Ok(fd) => Err(refuse(path, format!("another server answers there{}; {FREE_IT}", of(&fd)))),
        Err(Errno::AGAIN) => Err(refuse(path, format!("another server answers there; {FREE_IT}"))),
        // A stream socket (EPROTOTYPE) or another user's: whose it is cannot be told, so it stays.
        Err(e) => Err(refuse(path, format!("another program's socket is there ({e}); {FREE_IT}"))),
    }
}

const FREE_IT: &str = "stop it, or take another --socket (or --name)";

/// Pid and uid of who listens at the other end, in brackets.
fn of(fd: &OwnedFd) -> String {
    peer_uid(fd).map_or_else(|_| String::new(), |(uid, pid)| format!(" (pid {pid}, uid {uid})"))
}

/// Connects without waiting.
fn dial(path: &Path) -> rustix::io::Result<OwnedFd> {
    let (address, fd) = (SocketAddrUnix::new(path)?, seqpacket()?);
    rustix::net::connect(&fd, &address)?;
    Ok(fd)
}

/// Uid and pid of the process that listens under a path. `None`: nobody does, or not now.
pub(crate) fn who_listens(path: &Path) -> Option<(u32, i32)> {
    peer_uid(dial(path).ok()?).ok()
}

/// Whether somebody listens under a path who has as many connections waiting as may wait: a stopped server, in time.
pub(crate) fn is_full(path: &Path) -> bool {
    dial(path).is_err_and(|e| e == Errno::AGAIN)
}

fn seqpacket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// A path whose folder has no other name.
pub(crate) fn canonical(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(fs::canonicalize(dir)?.join(name))
}

/// Where a socket is to be bound: its path, and the name that it has until it listens.
struct Place {
    path: PathBuf,
    temporary: PathBuf,
    address: SocketAddrUnix,
}

impl Place {
    /// Makes the folder if it is missing; refuses what cannot be or is another's.
    fn new(path: &Path, doors: Doors) -> Result<Self, ServerError> {
        folder(path, doors)?;
        let name = path.file_name().ok_or_else(|| refuse(path, "is no file name"))?.to_string_lossy().into_owned();
        let path = canonical(path).doing(|| format!("finding {}", path.display()))?;
        check_free(&path)?;
        let temporary = path.with_file_name(format!(".{}.{name}", std::process::id()));
        let address = SocketAddrUnix::new(&temporary).map_err(|_| {
            refuse(
                &path,
                format!(
                    "is too long for a unix socket ({} bytes, about 100 fit); take a shorter --socket",
                    path.as_os_str().len()
                ),
            )
        })?;
        Ok(Self { path, temporary, address })
    }
}

impl BoundSocket {
    /// Refuses a path that `bind` would refuse now.
    pub fn check(path: &Path, doors: Doors) -> Result<(), ServerError> {
        Place::new(path, doors).map(drop)
    }

    /// Binds under a temporary name, then renames: a client finds either the old server's socket or this one.
    pub fn bind(path: &Path, doors: Doors) -> Result<Self, ServerError> {
        let Place { path, temporary, address } = Place::new(path, doors)?;
        let what = || format!("binding {}", path.display());
        let fd = seqpacket().doing(what)?;
        let _ = fs::remove_file(&temporary);
        rustix::net::bind(&fd, &address).doing(what)?;
        let bound = fs::set_permissions(&temporary, fs::Permissions::from_mode(doors.socket_mode()))
            .and_then(|()| rustix::net::listen(&fd, BACKLOG).map_err(Into::into))
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| fs::symlink_metadata(&path));
        let meta = bound.inspect_err(|_| drop(fs::remove_file(&temporary))).doing(what)?;
        if doors == Doors::Open {
            warn_of_closed_folders(&path);
        }
        Ok(Self { fd, path, inode: (meta.dev(), meta.ino()) })
    }

    /// Absolute path under which it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let mine = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if mine {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_or_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        fs::write(&path, "notes").unwrap();
        assert!(BoundSocket::bind(&path, Doors::Own).unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
        fs::remove_file(&path).unwrap();
        let first = BoundSocket::bind(&path, Doors::Own).unwrap();
        let error = BoundSocket::bind(&path, Doors::Own).unwrap_err().to_string();
        assert!(error.contains(&format!("another server answers there (pid {},", std::process::id())), "{error}");
        drop(first);
        let others = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(BoundSocket::bind(&path, Doors::Own).unwrap_err().to_string().contains("another program's socket"));
        drop(others);
        BoundSocket::bind(&path, Doors::Own).unwrap();
    }

    #[test]
    fn a_later_server_takes_the_name_of_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/x.sock");
        let first = BoundSocket::bind(&path, Doors::Own).unwrap();
        assert_eq!(fs::metadata(dir.path().join("sub")).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        // As a SIGKILL leaves it: the file is there, nobody listens.
        let left = dir.path().join("left.sock");
        fs::rename(&path, &left).unwrap();
        drop(first);
        fs::rename(&left, &path).unwrap();
        let second = BoundSocket::bind(&path, Doors::Own).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_is_too_long_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = BoundSocket::bind(&dir.path().join("x".repeat(120)), Doors::Own).unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }
}
