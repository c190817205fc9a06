//! The loop: commands, sessions in turn, sleep.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use kvmp_core::clock::Ticks;
use kvmp_core::ids::{EngineToken, NamespaceId, PartId};
use kvmp_core::ring::Parking;
use kvmp_core::store::BlockStore;
use rustix::event::{Timespec, epoll};

use super::clock::SegmentClock;
use super::command::{Command, Faults, SessionId};
use super::engines::{DMA_GRACE, Engines, Gone};
use super::namespaces::Namespaces;
use super::session::{Session, SessionFault, Turns};
use super::stats::Counters;
use crate::segment::{HolderLocks, SegmentFile, SegmentTable, boot_clock_ns};

/// Spinning before sleep, where there are cores to spare for it.
const SPIN: Duration = Duration::from_micros(2);
/// Fewer cores than this, and the thread never spins.
const SPIN_CORES: usize = 4;
/// How often entries of ended sessions are looked at: quickly at first, for those that take long more seldom.
const WATCH: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// How long the last requests may take once the server is told to stop.
const DRAIN: Duration = Duration::from_millis(500);
/// How often expired read leases are looked for.
const EXPIRE: Duration = Duration::from_secs(1);

/// What the thread starts with.
pub(crate) struct PlaneStart {
    pub segment: Arc<SegmentFile>,
    pub store: BlockStore<SegmentTable>,
    pub namespaces: Namespaces,
    pub holders: HolderLocks,
    /// Holder entries held at start-up: while any is, recovered Writing slots are quarantined.
    pub held_before: Vec<u32>,
    /// Whether recovery found any.
    pub quarantined: bool,
    pub commands: Receiver<Command>,
    pub bell: Arc<OwnedFd>,
    pub faults: Faults,
    pub policy: String,
}

/// The data-plane thread's state.
pub(crate) struct Plane {
    pub(crate) store: BlockStore<SegmentTable>,
    pub(super) segment: Arc<SegmentFile>,
    pub(super) namespaces: Namespaces,
    pub(super) sessions: HashMap<SessionId, Session>,
    pub(super) engines: Engines,
    pub(super) counters: Counters,
    pub(super) policy: String,
    holders: HolderLocks,
    pub(super) holder_of: HashMap<SessionId, u32>,
    held_before: Vec<u32>,
    /// Recovered Writing slots are held back: since when nobody holds an entry of before.
    quarantine: Quarantine,
    pub(super) turns: Turns,
    commands: Receiver<Command>,
    pub(super) epoll: OwnedFd,
    clock: SegmentClock,
    pub(super) tokens: u64,
    spin: Duration,
    pub(super) watched_since: Option<Instant>,
    pub(super) next_watch: Instant,
    next_expire: Instant,
    stopping: bool,
    /// Told to stop: only what was begun is served.
    pub(super) draining: bool,
    faults: Faults,
}

/// Recovered Writing slots: `Held -> Grace -> Over`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Quarantine {
    /// A client of the last server may still be storing.
    Held,
    /// None can; but DMA of one that died just now may still land.
    Grace(Instant),
    /// They were given back.
    Over,
}

impl Plane {
    pub fn new(start: PlaneStart) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge-triggered and never read: a bell wakes the thread once, and its counter blocks nobody.
        epoll::add(&epoll, &start.bell, epoll::EventData::new_u64(0), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        let header = start.segment.table.header();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let now = Instant::now();
        Ok(Self {
            store: start.store,
            namespaces: start.namespaces,
            sessions: HashMap::new(),
            engines: Engines::default(),
            counters: Counters::new(now),
            policy: start.policy,
            holders: start.holders,
            holder_of: HashMap::new(),
            held_before: start.held_before,
            quarantine: if start.quarantined { Quarantine::Held } else { Quarantine::Over },
            turns: Turns::new(),
            commands: start.commands,
            epoll,
            clock: SegmentClock::of(&start.segment.table),
            tokens: header.map_or(1, |h| h.server_epoch),
            spin: if cores >= SPIN_CORES { SPIN } else { Duration::ZERO },
            watched_since: None,
            next_watch: now,
            next_expire: now + EXPIRE,
            stopping: false,
            draining: false,
            faults: start.faults,
            segment: start.segment,
        })
    }

    /// Serves until told to stop, or until there is no file any more to serve from.
    pub fn run(mut self) {
        while !self.stopping {
            if self.segment.is_severed() {
                return self.wait_for_the_end();
            }
            if !(self.turn() || self.spin()) {
                self.sleep();
            }
        }
        self.drain();
    }

    /// Nothing is answered any more, and nothing is drained. The thread stays: its end would be a failure of its own, told
    /// before the control thread has told the reason.
    fn wait_for_the_end(self) {
        while !matches!(self.commands.recv(), Ok(Command::Stop) | Err(_)) {}
    }

    /// Commands, a slice of each session, what time has brought; whether there was anything to do.
    pub(crate) fn turn(&mut self) -> bool {
        let commanded = self.obey();
        let served = self.round() | self.store.drain_some();
        self.watch();
        commanded || served
    }

    /// Before the end: what was begun is finished and what was written is committed; what is asked anew is told to wait.
    fn drain(&mut self) {
        self.draining = true;
        let until = Instant::now() + DRAIN;
        while self.round() && Instant::now() < until {}
    }

    /// Boot-time clock in 1/16 s since the file was made.
    pub(super) fn now(&self) -> Ticks {
        self.clock.at(boot_clock_ns())
    }

    /// Gives each session one slice.
    fn round(&mut self) -> bool {
        let mut served = false;
        for _ in 0..self.turns.len() {
            let Some(id) = self.turns.pop_front() else { break };
            let Some(mut session) = self.sessions.remove(&id) else { continue };
            match self.slice(&mut session) {
                Ok(busy) => {
                    served |= busy;
                    session.announce();
                    self.sessions.insert(id, session);
                    self.turns.push_back(id);
                }
                Err(fault) => self.fault(session, &fault),
            }
        }
        served
    }

    fn fault(&mut self, session: Session, fault: &SessionFault) {
        tracing::warn!("session {} is ended: {fault}", session.id.0);
        self.counters.protocol_errors += 1;
        // The client is told why by the control thread, which closes its socket.
        self.faults.tell(session.id, fault.to_string());
        self.end(session);
    }

    fn ready(&mut self) -> bool {
        self.sessions.values_mut().any(Session::is_ready)
    }

    fn spin(&mut self) -> bool {
        let until = Instant::now() + self.spin;
        while Instant::now() < until {
            if self.ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn sleep(&mut self) {
        let segment = Arc::clone(&self.segment);
        let parking = Parking(segment.table.parked());
        parking.announce();
        if !self.ready() {
            let timeout =
                self.timeout().map(|d| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) });
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
            // EINTR is a wake-up like any other.
            let _ = epoll::wait(&self.epoll, &mut events, timeout.as_ref());
        }
        parking.withdraw();
    }

    fn timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        let watch = self.watching().then_some(self.next_watch);
        let expire = (self.store.stats().read_leases > 0).then_some(self.next_expire);
        [watch, expire].into_iter().flatten().min().map(|at| at.saturating_duration_since(now))
    }

    /// Whatever depends on time: entries of ended sessions, expired leases.
    fn watch(&mut self) {
        let now = Instant::now();
        if now >= self.next_expire {
            self.next_expire = now + EXPIRE;
            let ticks = self.now();
            self.store.expire(ticks);
        }
        if !self.watching() {
            self.watched_since = None;
        } else if now >= self.next_watch {
            let since = *self.watched_since.get_or_insert(now);
            self.next_watch = now + if now.duration_since(since) < Duration::from_secs(2) { WATCH.0 } else { WATCH.1 };
            self.settle(now);
        }
    }

    fn settle(&mut self, now: Instant) {
        let holders = &self.holders;
        for gone in self.engines.settle(now, |holder| holders.is_free(holder)) {
            match gone {
                Gone::Part(engine, part) => {
                    if self.store.part_writer_gone(engine, part) > 0 {
                        self.engines.bar(engine, part);
                    }
                }
                Gone::Unjoined(engine) => self.close_unjoined(engine),
                Gone::Engine(engine) => {
                    self.store.engine_gone(engine);
                    tracing::debug!("engine {:016x} is gone", engine.0);
                }
            }
        }
        self.settle_before(now);
    }

    fn close_unjoined(&mut self, engine: EngineToken) {
        for part in (0..self.namespaces.most_parts()).map(PartId) {
            if !self.engines.has_joined(engine, part) {
                let _ = self.store.part_writer_gone(engine, part);
            }
        }
    }

    /// Slots that were Writing when the last server died come back when none of its clients can still be storing.
    fn settle_before(&mut self, now: Instant) {
        let holders = &self.holders;
        self.held_before.retain(|&holder| !holders.is_free(holder));
        self.quarantine = match self.quarantine {
            Quarantine::Held if self.held_before.is_empty() => Quarantine::Grace(now),
            Quarantine::Grace(since) if now.duration_since(since) >= DMA_GRACE => {
                let slots = self.store.quarantine_release();
                tracing::info!("the last clients of the server before are gone: {slots} slots are free again");
                Quarantine::Over
            }
            same => same,
        };
    }

    fn watching(&self) -> bool {
        self.engines.watching() || self.quarantine != Quarantine::Over
    }

    fn obey(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.execute(command),
                Err(TryRecvError::Empty) => return any,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return true;
                }
            }
            any = true;
        }
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Attach { attach, reply } => drop(reply.send(self.attach(*attach))),
            Command::Detach { session, fault } => {
                if let Some(session) = self.sessions.remove(&session) {
                    self.counters.protocol_errors += u64::from(fault);
                    self.end(session);
                }
            }
            Command::Open { session, spec, reply } => drop(reply.send(self.open(session, *spec))),
            Command::Join { session, namespace, digest, layout, reply } => {
                drop(reply.send(self.join(session, NamespaceId(namespace), &digest, &layout)));
            }
            Command::ChunkBacked(chunk) => self.store.chunk_backed(chunk),
            Command::BackingEnded => self.store.backing_ended(),
            Command::Stop => self.stopping = true,
        }
    }
}
