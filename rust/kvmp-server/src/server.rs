//! A server in this process: `built -> started -> stopped`. The command line is a shim over it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use kvmp_core::geometry::Geometry;
use kvmp_core::ids::ChunkId;
use kvmp_core::wire::Role;
use rustix::event::{EventfdFlags, eventfd};

use crate::builder::ServerBuilder;
use crate::config::ServerConfig;
use crate::error::{Context, ServerError};
use crate::growth::{growth_ended, no_room};
use crate::limits::{Sources, bounds, tightest_total};
use crate::listen::{BoundSocket, Control, ControlStart, Rendezvous};
use crate::plane::{Command, Faults, Namespaces, Plane, PlaneHandle, PlaneStart};
use crate::process::WatchedProcess;
use crate::recovery::{Recovery, recover};
use crate::segment::backing::Backing;
use crate::segment::{Claim, FileState, Found, HolderLocks, SegmentFile, SegmentTable, nodes};
use crate::upgrade;

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    watched: Option<WatchedProcess>,
    segment: Arc<SegmentFile>,
    socket_path: PathBuf,
    plane: PlaneHandle,
    stop: Arc<Stop>,
    rendezvous: Option<Rendezvous>,
    threads: Vec<JoinHandle<()>>,
    failed: Receiver<ServerError>,
}

/// Told to all threads: a flag to look at, a descriptor to poll.
#[derive(Debug)]
struct Stop {
    flag: AtomicBool,
    bell: Arc<OwnedFd>,
}

fn make_bell() -> Result<Arc<OwnedFd>, ServerError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Arc::new).doing(|| "making an eventfd".into())
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ServerError> {
    std::thread::Builder::new().name(name.into()).spawn(body).doing(|| format!("starting the thread {name}"))
}

fn check_size(config: &ServerConfig, geometry: &Geometry, sources: &Sources) -> Result<(), ServerError> {
    let bounds = bounds(&config.arena_dir, sources);
    match tightest_total(&bounds).filter(|bound| bound.total < geometry.arena_bytes()) {
        None => Ok(()),
        Some(bound) => Err(ServerError::NeverFits {
            size: config.size,
            what: bound.what.clone(),
            total: bound.total,
            mend: bound.mend.clone(),
        }),
    }
}

/// The sockets; nobody is answered before the threads run.
fn open_doors(config: &ServerConfig) -> Result<(BoundSocket, Option<Rendezvous>), ServerError> {
    let socket = BoundSocket::bind(&config.socket, config.doors())?;
    let rendezvous = Rendezvous::start(config, socket.path())?;
    Ok((socket, rendezvous))
}

/// A descriptor of the server's own to ask for locks with.
fn holder_locks(segment: &SegmentFile) -> Result<HolderLocks, ServerError> {
    segment.reopen(true).map(|fd| HolderLocks::new(fd.into())).doing(|| "opening the segment".into())
}

/// Recovers the store and makes the data plane over it; gives the chunks that have no memory yet.
fn make_plane(
    config: &ServerConfig,
    segment: &Arc<SegmentFile>,
    held_before: Vec<u32>,
    commands: Receiver<Command>,
    bell: Arc<OwnedFd>,
    faults: Faults,
) -> Result<(Plane, Vec<ChunkId>), ServerError> {
    let policy = kvmp_core::policy::factory(&config.policy)
        .map_err(|e| ServerError::Config { key: "--policy".into(), why: e.to_string() })?;
    if let Found::Replaced(why) = &segment.found {
        tracing::warn!("{} is replaced by a new, empty one: {why}", segment.path().display());
    }
    let mut namespaces = Namespaces::new(Arc::clone(segment));
    let table = SegmentTable::new(segment.table.clone());
    let Recovery { store, cold, report, took } = recover(segment, &mut namespaces, policy, table);
    if segment.found == Found::Segment {
        tracing::info!(
            "{} recovered in {:.1} ms: {} blocks kept, {} dropped, {} held back until their writers are gone",
            segment.path().display(),
            took.as_secs_f64() * 1e3,
            report.kept,
            report.evicted,
            report.quarantined
        );
    }
    let start = PlaneStart {
        segment: Arc::clone(segment),
        store,
        namespaces,
        holders: holder_locks(segment)?,
        held_before,
        quarantined: report.quarantined > 0,
        commands,
        bell,
        faults,
        policy: config.policy.clone(),
    };
    Ok((Plane::new(start).doing(|| "making the data plane".into())?, cold))
}

impl Server {
    /// Settings for a new server.
    #[must_use]
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// Starts a server with checked settings.
    pub fn start(config: ServerConfig) -> Result<Self, ServerError> {
        Self::start_unless(config, &mut || None)
    }

    /// As `start`, but for [`ServerError::GivenUp`] as soon as `given_up` says why, or the watched process ends, while
    /// another server is waited for (`upgrade`).
    pub fn start_unless(
        config: ServerConfig,
        given_up: &mut dyn FnMut() -> Option<String>,
    ) -> Result<Self, ServerError> {
        // First of all: a process that ends while the server starts is seen to have ended.
        let watched = config.until_pid.map(WatchedProcess::open).transpose()?;
        let mut given_up = || given_up().or_else(|| watched.as_ref()?.has_ended());
        let geometry = Geometry::new(config.size, config.chunk)?;
        let sources = Sources::default();
        check_size(&config, &geometry, &sources)?;
        let claim = match &config.upgrade {
            Some(upgrade) => upgrade::claim(&config, geometry, upgrade, &mut given_up)?,
            None => Claim::new(&config, geometry)?,
        };
        // Whatever may be refused is, before an old cache is given up for a new file.
        let doors = match open_doors(&config) {
            Ok(doors) => doors,
            Err(e) => {
                claim.give_up();
                return Err(e);
            }
        };
        let segment = Arc::new(claim.with_memory()?.open()?);
        let mut started = Self::start_on(config, Arc::clone(&segment), doors, sources);
        if let Ok(server) = &mut started {
            server.watched = watched;
        }
        if started.is_err() && segment.found != Found::Segment {
            // Nobody has seen the file that this start made.
            segment.unlink();
        }
        started
    }

    fn start_on(
        config: ServerConfig,
        segment: Arc<SegmentFile>,
        (socket, rendezvous): (BoundSocket, Option<Rendezvous>),
        sources: Sources,
    ) -> Result<Self, ServerError> {
        let socket_path = socket.path().to_owned();
        let (commands, receiver) = channel();
        let bell = make_bell()?;
        let plane = PlaneHandle::new(commands, Arc::clone(&bell));
        let (fault, faults) = channel();
        let faults_bell = make_bell()?;
        // Before recovery: whoever holds an entry now may be storing into what recovery finds Writing, readers excepted.
        let mut held_before = holder_locks(&segment)?.held().doing(|| "asking for locks".into())?;
        held_before.retain(|&entry| segment.table.holder(entry).1 != Role::Reader as u64);
        let faults_to = Faults::new(fault, Arc::clone(&faults_bell));
        let (data_plane, cold) = make_plane(&config, &segment, held_before.clone(), receiver, bell, faults_to)?;
        let stop = Arc::new(Stop { flag: AtomicBool::new(false), bell: make_bell()? });
        let (fail, failed) = channel();
        let control = Control::new(ControlStart {
            socket,
            segment: Arc::clone(&segment),
            holders: holder_locks(&segment)?.sparing(held_before),
            plane: plane.clone(),
            allow_uids: config.allow_uids.clone(),
            stop: Arc::clone(&stop.bell),
            fail: fail.clone(),
            faults,
            faults_bell,
        });
        let mut server =
            Self { config, watched: None, segment, socket_path, plane, stop, rendezvous, threads: Vec::new(), failed };
        server.threads.push(spawn("kvmp-plane", move || data_plane.run())?);
        server.threads.push(spawn("kvmp-control", move || control.run())?);
        server.back(cold, sources, fail)?;
        Ok(server)
    }

    /// Starts the growth of the arena; the thread ends by itself.
    fn back(&mut self, cold: Vec<ChunkId>, sources: Sources, fail: Sender<ServerError>) -> Result<(), ServerError> {
        let (segment, plane, stop) = (Arc::clone(&self.segment), self.plane.clone(), Arc::clone(&self.stop));
        let arena_dir = self.config.arena_dir.clone();
        let layout = *segment.table.layout();
        let backed_before = layout.geometry.chunks as usize - cold.len();
        if cold.is_empty() {
            self.plane.send(Command::BackingEnded);
            return Ok(());
        }
        if backed_before == 0 {
            let backing = Backing {
                file: segment.file(),
                layout,
                arena_dir: arena_dir.clone(),
                sources: sources.clone(),
                stop: &stop.flag,
            };
            if let Some(bound) = backing.lacks_room(layout.geometry.chunk_bytes) {
                return Err(no_room(&layout.geometry, bound));
            }
        }
        let thread = spawn("kvmp-backing", move || {
            nodes::report(&nodes::spread(&sources));
            let backing = Backing { file: segment.file(), layout, arena_dir, sources, stop: &stop.flag };
            let mut backed = backed_before;
            let ended = backing.run(cold, |chunk| {
                segment.has_memory(chunk);
                if segment.table.evict_strays(chunk) {
                    backed += 1;
                    plane.send(Command::ChunkBacked(chunk));
                } else {
                    tracing::warn!(
                        "chunk {} is left out: its word is damaged, and some of it may still be written",
                        chunk.0
                    );
                }
            });
            plane.send(Command::BackingEnded);
            if let Some(error) = growth_ended(ended, backed, &layout.geometry) {
                let _ = fail.send(error);
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// `unix:PATH` that clients connect to.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.socket_path.display())
    }

    /// The TCP rendezvous, if there is one.
    #[must_use]
    pub fn tcp(&self) -> Option<std::net::SocketAddr> {
        self.rendezvous.as_ref().map(|rendezvous| rendezvous.address)
    }

    /// Settings it runs with.
    #[must_use]
    pub fn config(&self) -> &ServerConfig {
        &self.config
    }

    /// The process whose end is to end the server, if one was named. `kvmp serve` stops with it; a program that embeds
    /// a server looks at it for itself.
    #[must_use]
    pub fn watched(&self) -> Option<&WatchedProcess> {
        self.watched.as_ref()
    }

    /// Whether the next start under the name will find this server's segment.
    #[must_use]
    pub fn leaves_segment(&self) -> bool {
        !self.config.ephemeral && self.segment.state() == FileState::AsItWas
    }

    /// Path of the segment file.
    #[must_use]
    pub fn segment_path(&self) -> &Path {
        self.segment.path()
    }

    /// Bytes of memory that the segment takes now.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.segment.resident_bytes()
    }

    /// An error that came up after the start and leaves the server useless, if one did.
    #[must_use]
    pub fn failure(&self) -> Option<ServerError> {
        self.failed.try_recv().ok()
    }

    /// Whether every thread that serves is alive.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.threads.iter().take(2).all(|thread| !thread.is_finished())
    }

    /// Stops serving; an ephemeral segment is unlinked. Sessions see a hang-up.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.flag.store(true, Ordering::Relaxed);
        let _ = rustix::io::write(&*self.stop.bell, &1u64.to_ne_bytes());
        self.plane.send(Command::Stop);
        self.rendezvous = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // A hollow file has its length, and would be taken for whole.
        if self.config.ephemeral || self.segment.state() == FileState::Hollow {
            self.segment.unlink();
        }
    }
}
