//! A server that does just what a test tells it: real socket, segment and ring, answers given by hand.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kvmp_client::{Bound, Client, ConnectOptions};
use kvmp_core::geometry::Geometry;
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::ring::{COMPLETIONS, Consumer, MappedQueue, Parking, Producer, Ring, SUBMISSIONS};
use kvmp_core::segment::{
    Access, Layout, LockKind, Mapping, SegmentHeader, SegmentId, TableMap, first_locked, try_lock,
};
use kvmp_core::wire::{
    ClientMessage, Completion, Geometries, Opened, Role, ServerMessage, Submission, Welcome, receive, send,
};
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::thread::futex;

pub const GENEROUS: u64 = 10_000;

/// The server's ends of one session.
pub struct Fake {
    pub ring: Ring,
    pub submissions: Consumer<MappedQueue>,
    pub completions: Producer<MappedQueue>,
    pub socket: Option<OwnedFd>,
    pub table: TableMap,
    holder: File,
    _folder: tempfile::TempDir,
}

/// A listener, before its one client has come.
pub struct Listener {
    socket: OwnedFd,
    folder: tempfile::TempDir,
    pub path: PathBuf,
    pub lie: fn(&mut Welcome),
}

fn memfd(name: &str, len: u64) -> File {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    u128::from_str_radix(&text.trim().replace('-', ""), 16).unwrap().to_be_bytes()
}

fn segment() -> (File, TableMap) {
    let layout = Layout::new(Geometry::new(8 << 20, None).unwrap());
    let file = memfd("fake-segment", layout.file_bytes());
    let table = TableMap::new(Mapping::new(&file, 0, layout.table_bytes(), Access::ReadWrite).unwrap(), layout);
    table.set_header(&SegmentHeader::new(&layout, SegmentId([7; 16]), boot_id(), 0));
    (file, table)
}

/// A holder entry as a server makes it: the file, and a descriptor of its own that has the read lock.
fn holder(folder: &Path) -> (File, File) {
    let path = folder.join("holder");
    let own = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let sent = File::open(&path).unwrap();
    assert!(try_lock(&sent, LockKind::Shared, 0, 1).unwrap());
    (own, sent)
}

fn welcome(table: &TableMap) -> Welcome {
    let geometry = table.layout().geometry;
    Welcome {
        session: 1,
        server_epoch: 42,
        server_version: "0".into(),
        engine_token: 5,
        segment_id: SegmentId([7; 16]).to_string(),
        geometry: Geometries { chunk_bytes: geometry.chunk_bytes, chunks: geometry.chunks },
        keys_max: 16,
        features: Vec::new(),
    }
}

impl Listener {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fake.sock");
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        Self { socket, folder, path, lie: |_| {} }
    }

    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// The connection of a client that has said hello.
    pub fn greeted(&self) -> OwnedFd {
        let socket = rustix::net::accept(&self.socket).unwrap();
        let (hello, _) = receive::<ClientMessage>(&socket).unwrap();
        assert!(matches!(hello, ClientMessage::Hello(_)));
        socket
    }

    pub fn accept(self) -> Fake {
        let socket = self.greeted();
        let (segment, table) = segment();
        let memory = memfd("fake-ring", Ring::BYTES);
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (holder, sent_holder) = holder(self.folder.path());
        let mut welcome = welcome(&table);
        (self.lie)(&mut welcome);
        let fds = [segment.as_fd(), memory.as_fd(), doorbell.as_fd(), sent_holder.as_fd()];
        send(&socket, &ServerMessage::Welcome(welcome), &fds).unwrap();
        let ring = Ring::new(Mapping::new(&memory, 0, Ring::BYTES, Access::ReadWrite).unwrap());
        Fake {
            submissions: Consumer::new(ring.queue(SUBMISSIONS)),
            completions: Producer::new(ring.queue(COMPLETIONS)),
            ring,
            socket: Some(socket),
            table,
            holder,
            _folder: self.folder,
        }
    }
}

impl Fake {
    /// A scheduler and the server's ends of its session.
    pub fn connected() -> (Client, Self) {
        Self::connected_as(&ConnectOptions::new(Role::Scheduler))
    }

    pub fn connected_as(options: &ConnectOptions) -> (Client, Self) {
        let listener = Listener::new();
        let endpoint = listener.endpoint();
        let server = std::thread::spawn(move || listener.accept());
        let client = Client::connect(&endpoint, options, &Bound::ms(GENEROUS)).unwrap();
        (client, server.join().unwrap())
    }

    /// Answers one open as a server that takes every spec.
    pub fn answer_open(&self) {
        let (message, _) = receive::<ClientMessage>(self.socket.as_ref().unwrap()).unwrap();
        let ClientMessage::Open { spec } = message else { panic!("{message:?}") };
        self.say_opened(spec);
    }

    /// Answers one join of a namespace with this spec.
    pub fn answer_join(&self, spec: NamespaceSpec) {
        let (message, _) = receive::<ClientMessage>(self.socket.as_ref().unwrap()).unwrap();
        assert!(matches!(message, ClientMessage::Join { .. }), "{message:?}");
        self.say_opened(spec);
    }

    fn say_opened(&self, spec: NamespaceSpec) {
        let socket = self.socket.as_ref().unwrap();
        let digest = spec.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        send(socket, &ServerMessage::Opened(Opened { namespace: 3, digest, spec }), &[]).unwrap();
    }

    /// Whether the client's holder entry is locked still, asked as a server asks.
    pub fn holder_is_locked(&self) -> bool {
        first_locked(&self.holder, 0, 1).unwrap().is_some()
    }

    /// Takes the next submission; waits for it, as a client in another thread may be about to send it.
    pub fn take(&mut self) -> Submission {
        loop {
            if let Some(entry) = self.submissions.pop().unwrap() {
                return Submission::from_entry(entry);
            }
            std::thread::yield_now();
        }
    }

    pub fn take_now(&mut self) -> Option<Submission> {
        self.submissions.pop().unwrap().map(Submission::from_entry)
    }

    pub fn complete(&mut self, completion: Completion) {
        self.completions.push(&completion.to_entry()).unwrap().unwrap();
        if Parking(self.ring.client_parked()).must_ring() {
            futex::wake(self.ring.completion_futex(), futex::Flags::empty(), i32::MAX as u32).unwrap();
        }
    }
}
