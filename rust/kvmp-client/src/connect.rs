//! From an endpoint to a mapped session: connect, look who is there, hello, map, compare.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use kvmp_core::geometry::Geometry;
use kvmp_core::ring::Ring;
use kvmp_core::segment::{Access, Layout, Mapping, SegmentHeader, TableMap, boot_id};
use kvmp_core::wire::{ClientMessage, FEATURE_READERS, Hello, Role, ServerMessage, SocketError, Welcome, peer_uid};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::control::{Control, ExchangeError, greet};
use crate::error::not_connected;
use crate::fork::{self, LocalFd};
use crate::holder::Holder;
use crate::{Bound, ClientError, Endpoint, KeptArena};

/// What to connect as.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// What this client is.
    pub role: Role,
    /// Engine to join (workers, readers).
    pub engine_token: Option<u64>,
    /// Part this client writes (workers), or loads only (readers).
    pub part: Option<u16>,
    /// Whether its copies are DMA, which may land after the process is gone.
    pub dma: bool,
    /// Folder that the socket is found in here, where it is not the server's own (containers).
    pub socket_dir: Option<PathBuf>,
    /// Uids a server may have beside this process's own and root.
    pub allow_uids: Vec<u32>,
    /// Mapping of an earlier client ([`crate::Client::keep_arena`]), used on where the segment is the same inode.
    pub keep: Option<KeptArena>,
}

impl ConnectOptions {
    /// Options of a role, all else left out.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self { role, engine_token: None, part: None, dma: false, socket_dir: None, allow_uids: Vec::new(), keep: None }
    }

    fn check(&self) -> Result<(), ClientError> {
        match (self.role, self.engine_token, self.part) {
            (Role::Worker | Role::Reader, None, _) => {
                Err(crate::error::input("engine_token", "a worker or reader joins its scheduler's engine by this"))
            }
            (Role::Worker | Role::Reader, _, None) => {
                Err(crate::error::input("part", "a worker must say which part it writes, a reader which it loads"))
            }
            (Role::Scheduler | Role::Tool, Some(_), _) => Err(crate::error::input(
                "engine_token",
                "only workers and readers give one; a scheduler is given a new one",
            )),
            (Role::Scheduler | Role::Tool, _, Some(_)) => {
                Err(crate::error::input("part", "only workers and readers have a part"))
            }
            _ => Ok(()),
        }
    }

    fn hello(&self) -> ClientMessage {
        ClientMessage::Hello(Hello {
            role: self.role,
            pid: std::process::id(),
            engine_token: self.engine_token,
            part: self.part,
            dma: self.dma,
            features: vec![FEATURE_READERS.into()],
        })
    }
}

/// What a hello brought, mapped and checked.
pub(crate) struct Attached {
    pub path: PathBuf,
    pub welcome: Welcome,
    pub control: Control,
    pub doorbell: LocalFd,
    pub holder: Holder,
    pub ring: Ring,
    pub table: TableMap,
    pub segment: File,
}

/// Connects within the bound.
pub(crate) fn attach(
    endpoint: &Endpoint,
    options: &ConnectOptions,
    bound: &Bound<'_>,
) -> Result<Attached, ClientError> {
    options.check()?;
    fork::install();
    let path = endpoint.socket_path(options.socket_dir.as_deref(), bound)?;
    let place = Endpoint::Unix(path.clone()).to_string();
    let socket = dial(&path, bound).map_err(|errno| not_dialed(endpoint, &path, errno.into()))?;
    let fd = socket.get().ok_or(ClientError::Forked { parent: 0 })?;
    check_peer(fd, &place, &options.allow_uids)?;
    let (welcome, fds) = hello(fd, options, &place, bound)?;
    map(path, welcome, Control::new(socket), fds)
}

/// A socket that is missing at an endpoint of its own is a server's that is not there. Missing where a rendezvous that
/// answers said it is, it is out of sight.
fn not_dialed(endpoint: &Endpoint, path: &Path, source: io::Error) -> ClientError {
    match endpoint {
        Endpoint::Tcp(..) if source.kind() == io::ErrorKind::NotFound => {
            ClientError::SocketElsewhere { endpoint: endpoint.to_string(), path: path.to_owned(), source }
        }
        _ => not_connected(Endpoint::Unix(path.to_owned()).to_string(), source),
    }
}

/// A socket that no forked child keeps, from its first moment on.
fn local_socket() -> rustix::io::Result<LocalFd> {
    let mut registry = fork::registry();
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok(LocalFd::new(socket, &mut registry))
}

fn dial(path: &Path, bound: &Bound<'_>) -> rustix::io::Result<LocalFd> {
    let address = SocketAddrUnix::new(path)?;
    let local = local_socket()?;
    let socket = local.get().ok_or(rustix::io::Errno::BADF)?;
    // A full backlog makes a unix connect wait; the send time-out bounds that (zero would mean for ever).
    let limit = bound.left().max(std::time::Duration::from_millis(1));
    rustix::net::sockopt::set_socket_timeout(socket, rustix::net::sockopt::Timeout::Send, Some(limit))?;
    rustix::io::retry_on_intr(|| rustix::net::connect(socket, &address))?;
    rustix::io::ioctl_fionbio(socket, true)?;
    Ok(local)
}

fn check_peer(socket: BorrowedFd<'_>, place: &str, allowed: &[u32]) -> Result<(), ClientError> {
    let hello = |source| ClientError::Hello { endpoint: place.to_owned(), source };
    let (uid, _) = peer_uid(socket).map_err(hello)?;
    let own = rustix::process::geteuid().as_raw();
    if uid == own || uid == 0 || allowed.contains(&uid) {
        return Ok(());
    }
    Err(ClientError::PeerUid { endpoint: place.to_owned(), uid, own })
}

fn hello(
    socket: BorrowedFd<'_>,
    options: &ConnectOptions,
    place: &str,
    bound: &Bound<'_>,
) -> Result<(Welcome, Vec<LocalFd>), ClientError> {
    match greet(socket, &options.hello(), bound) {
        Ok((ServerMessage::Welcome(welcome), fds)) => Ok((welcome, fds)),
        Ok((ServerMessage::Refused { refusal, message }, _)) => {
            Err(ClientError::Refused { endpoint: place.to_owned(), refusal, message })
        }
        Ok((other, _)) => Err(ClientError::Protocol(format!("{place} answered a hello with {other:?}"))),
        Err(ExchangeError::Socket(source)) => Err(ClientError::Hello { endpoint: place.to_owned(), source }),
        Err(ExchangeError::Interrupted) => Err(ClientError::Interrupted),
    }
}

fn map(path: PathBuf, welcome: Welcome, control: Control, fds: Vec<LocalFd>) -> Result<Attached, ClientError> {
    let [segment, ring, doorbell, holder] = <[LocalFd; 4]>::try_from(fds)
        .map_err(|fds| ClientError::Protocol(format!("the welcome came with {} descriptors, not 4", fds.len())))?;
    let (segment, ring) = (file(&segment)?, file(&ring)?);
    let table = map_table(&segment, &welcome)?;
    let ring = Ring::new(map_file("ring", &ring, Ring::BYTES, Access::ReadWrite)?);
    Ok(Attached { path, welcome, control, doorbell, holder: Holder::new(holder), ring, table, segment })
}

/// A file of its own: mappings, unlike holder entries, may pass to a child.
fn file(fd: &LocalFd) -> Result<File, ClientError> {
    let fd = fd.get().ok_or(ClientError::Forked { parent: 0 })?;
    let own = fd.try_clone_to_owned().map_err(|e| ClientError::Attach(format!("duplicating a descriptor: {e}")))?;
    Ok(own.into())
}

/// Maps the first `len` bytes of a file that has at least as many: a shorter one would fault.
pub(crate) fn map_file(what: &str, file: &File, len: u64, access: Access) -> Result<Mapping, ClientError> {
    let fails = |why: String| ClientError::Attach(format!("{what}: {why}"));
    let found = file.metadata().map_err(|e| fails(e.to_string()))?.len();
    if found < len {
        return Err(fails(format!("{found} bytes where {len} are needed")));
    }
    Mapping::new(file, 0, len, access).map_err(|e| fails(format!("mapping {len} bytes: {e}")))
}

fn map_table(segment: &File, welcome: &Welcome) -> Result<TableMap, ClientError> {
    let fails = |why: String| ClientError::Attach(format!("segment: {why}"));
    let geometry = Geometry { chunk_bytes: welcome.geometry.chunk_bytes, chunks: welcome.geometry.chunks };
    let arena = geometry.chunk_bytes.saturating_mul(u64::from(geometry.chunks));
    Geometry::new(arena, Some(geometry.chunk_bytes)).map_err(|e| fails(e.to_string()))?;
    let layout = Layout::new(geometry);
    let table = TableMap::new(map_file("segment", segment, layout.table_bytes(), Access::Read)?, layout);
    check_header(&table, segment, welcome).map_err(fails)?;
    Ok(table)
}

fn check_header(table: &TableMap, segment: &File, welcome: &Welcome) -> Result<(), String> {
    let header: SegmentHeader = table.header().ok_or("its header does not parse")?;
    let len = segment.metadata().map_err(|e| e.to_string())?.len();
    let layout =
        header.check(len, boot_id().map_err(|e| format!("the kernel's boot id: {e}"))?).map_err(|e| e.to_string())?;
    if layout != *table.layout() {
        return Err(format!("its header says {:?}, the welcome {:?}", layout.geometry, table.layout().geometry));
    }
    let id = kvmp_core::segment::SegmentId(header.segment_id).to_string();
    if id != welcome.segment_id {
        return Err(format!("its header has the id {id}, the welcome {}", welcome.segment_id));
    }
    Ok(())
}

impl From<SocketError> for ClientError {
    fn from(error: SocketError) -> Self {
        Self::Protocol(error.to_string())
    }
}
