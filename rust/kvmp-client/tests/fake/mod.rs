//! A server that does just what a test tells it: real socket, segment and ring, answers given by hand.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use kvmp_client::{Bound, Client, ConnectOptions};
use kvmp_core::geometry::Geometry;
use kvmp_core::ring::{COMPLETIONS, Consumer, MappedQueue, Parking, Producer, Ring, SUBMISSIONS};
use kvmp_core::segment::{Access, Layout, Mapping, SegmentHeader, SegmentId, TableMap};
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

    pub fn accept(self) -> Fake {
        let socket = rustix::net::accept(&self.socket).unwrap();
        let (hello, _) = receive::<ClientMessage>(&socket).unwrap();
        assert!(matches!(hello, ClientMessage::Hello(_)));
        let (segment, table) = segment();
        let memory = memfd("fake-ring", Ring::BYTES);
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let holder = memfd("fake-holder", 0);
        let mut welcome = welcome(&table);
        (self.lie)(&mut welcome);
        let fds = [segment.as_fd(), memory.as_fd(), doorbell.as_fd(), holder.as_fd()];
        send(&socket, &ServerMessage::Welcome(welcome), &fds).unwrap();
        let ring = Ring::new(Mapping::new(&memory, 0, Ring::BYTES, Access::ReadWrite).unwrap());
        Fake {
            submissions: Consumer::new(ring.queue(SUBMISSIONS)),
            completions: Producer::new(ring.queue(COMPLETIONS)),
            ring,
            socket: Some(socket),
            _folder: self.folder,
        }
    }
}

impl Fake {
    /// A client and the server's ends of its session.
    pub fn connected() -> (Client, Self) {
        let listener = Listener::new();
        let endpoint = listener.endpoint();
        let server = std::thread::spawn(move || listener.accept());
        let options = ConnectOptions::new(Role::Scheduler);
        let client = Client::connect(&endpoint, &options, &Bound::ms(GENEROUS)).unwrap();
        (client, server.join().unwrap())
    }

    /// Answers one open or join as a server that takes every spec.
    pub fn answer_open(&self) {
        let socket = self.socket.as_ref().unwrap();
        let (message, _) = receive::<ClientMessage>(socket).unwrap();
        let ClientMessage::Open { spec } = message else { panic!("{message:?}") };
        let digest = spec.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        send(socket, &ServerMessage::Opened(Opened { namespace: 3, digest, spec }), &[]).unwrap();
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
