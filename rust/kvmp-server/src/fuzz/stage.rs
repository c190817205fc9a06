//! A data plane without its thread, over a small segment of its own that has no name; an engine whose rings a fuzzer
//! writes, and a bystander.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::{Duration, Instant};

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::{Geometry, MIN_CHUNK};
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, NamespaceId, PartId, SlotId};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::ring::{COMPLETIONS, Consumer, MappedQueue, QueueCells, RING_ENTRIES, Ring};
use kvmp_core::segment::{Access, Mapping};
use kvmp_core::slot::{PartSum, SlotWord};
use kvmp_core::store::ReserveAnswer;
use kvmp_core::wire::{Hello, Role};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;

use super::ring::Seen;
use crate::config::{ConfigSource, ServerConfig};
use crate::plane::{Attach, Command, Faults, Namespaces, Plane, PlaneHandle, PlaneStart, Refused, Reply, SessionId};
use crate::recovery::recover;
use crate::segment::{Claim, HolderLocks, SegmentFile, SegmentTable};

/// Workers of the engine.
pub(super) const PARTS: usize = 2;
/// The bystander's token: no session has it.
const BYSTANDER: EngineToken = EngineToken(u64::MAX);

pub(super) fn key(seed: u8, block: u32) -> [u8; 32] {
    let mut key = [seed; 32];
    key[..4].copy_from_slice(&block.to_le_bytes());
    key
}

/// Two namespaces: one prefix group, and two groups of different rules. A block's parts take a page each.
pub(super) fn specs() -> [NamespaceSpec; 2] {
    let group =
        |rule, hash_stride: u32| GroupSpec { rule, block_tokens: 16 * hash_stride, window_tokens: 0, hash_stride };
    let of = |model: &str, groups: Vec<GroupSpec>| NamespaceSpec {
        model: model.into(),
        facts: BTreeMap::new(),
        parts: vec![PartSpec { bytes: vec![4096; groups.len()], layout: 1.into() }; PARTS],
        groups,
        salt: String::new(),
    };
    let prefix = group(GroupRule::Prefix, 1);
    [of("one", vec![prefix.clone()]), of("two", vec![prefix, group(GroupRule::State, 2)])]
}

/// Settings of a segment of two chunks with a name that nobody else has.
pub(super) fn config() -> (ServerConfig, Geometry) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let source =
        ConfigSource { size: Some("4MiB".into()), chunk: Some("2MiB".into()), name: Some(name), ..Default::default() };
    (source.resolve().unwrap(), Geometry::new(2 * MIN_CHUNK, Some(MIN_CHUNK)).unwrap())
}

fn bell() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

/// One session of the engine.
pub(super) struct Actor {
    session: SessionId,
    token: EngineToken,
    pub part: u16,
    pub ring: Ring,
    completions: Consumer<MappedQueue>,
    /// Where the next entry goes: any number may be pushed.
    tail: u64,
    pub asked: u64,
    pub namespaces: [u16; 2],
    pub leases: [u64; 4],
    /// Keeps the entry locked.
    holder: Option<OwnedFd>,
}

impl Actor {
    /// Publishes an entry as a client does that does not look whether there is room.
    pub fn push(&mut self, entry: [u64; 8]) {
        let queue = self.ring.queue(kvmp_core::ring::SUBMISSIONS);
        for (cell, word) in queue.entry(self.tail % RING_ENTRIES).iter().zip(entry) {
            cell.store(word, kvmp_core::sync::Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(1);
        queue.tail().store(self.tail, kvmp_core::sync::Ordering::Release);
    }

    fn harvest(&mut self) {
        while let Ok(Some(entry)) = self.completions.pop() {
            super::ring::learn(&mut self.leases, entry);
        }
    }
}

pub(super) struct Stage {
    plane: Plane,
    handle: PlaneHandle,
    holders: HolderLocks,
    segment: Arc<SegmentFile>,
    /// Sessions that the plane ended.
    faults: Receiver<(SessionId, String)>,
    sessions: u64,
    actors: Vec<Actor>,
    pinned: Vec<(SlotId, SlotWord)>,
    pauses: u64,
}

impl Stage {
    pub fn new() -> Self {
        let (config, geometry) = config();
        let segment = Arc::new(Claim::new(&config, geometry).unwrap().open().unwrap());
        segment.unlink();
        let mut namespaces = Namespaces::new(Arc::clone(&segment));
        let store = recover(
            &segment,
            &mut namespaces,
            kvmp_core::policy::factory("lru").unwrap(),
            SegmentTable::new(segment.table.clone()),
        )
        .store;
        let locks = || HolderLocks::new(segment.reopen(true).unwrap().into());
        let ((commands, receiver), (fault, faults)) = (channel(), channel());
        let bell_of_plane = bell();
        let handle = PlaneHandle::new(commands, Arc::clone(&bell_of_plane));
        let start = PlaneStart {
            segment: Arc::clone(&segment),
            store,
            namespaces,
            holders: locks(),
            held_before: Vec::new(),
            quarantined: false,
            commands: receiver,
            bell: bell_of_plane,
            faults: Faults::new(fault, bell()),
            policy: "lru".into(),
        };
        let (plane, holders) = (Plane::new(start).unwrap(), locks());
        let mut this = Self {
            plane,
            handle,
            holders,
            segment,
            faults,
            sessions: 0,
            actors: Vec::new(),
            pinned: Vec::new(),
            pauses: 0,
        };
        this.set();
        this
    }

    fn set(&mut self) {
        self.handle.send(Command::ChunkBacked(ChunkId(0)));
        self.handle.send(Command::ChunkBacked(ChunkId(1)));
        self.handle.send(Command::BackingEnded);
        for (role, part) in [(Role::Scheduler, 0), (Role::Worker, 0), (Role::Worker, 1), (Role::Tool, 0)] {
            let actor = self.attach(role, part).unwrap_or_else(|why| panic!("{why:?}"));
            self.actors.push(actor);
        }
        self.seat_a_bystander();
        assert_eq!(self.plane.store.validate(), Ok(()));
    }

    fn ask<T>(&mut self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refused> {
        let (reply, answer) = sync_channel(1);
        self.handle.send(command(reply));
        self.plane.turn();
        answer.try_recv().unwrap()
    }

    /// A session; workers join the first actor's engine.
    fn attach(&mut self, role: Role, part: u16) -> Result<Actor, Refused> {
        let memory = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, Ring::BYTES).unwrap();
        let ring = Ring::new(Mapping::new(&memory.into(), 0, Ring::BYTES, Access::ReadWrite).unwrap());
        let (holder, lock) = self.holders.take(|| self.segment.reopen(false)).unwrap().unwrap();
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let own = matches!(role, Role::Worker | Role::Reader).then_some(part);
        let engine_token = own.map(|_| self.actors[0].token.0);
        let hello = Hello { role, pid: 1, engine_token, part: own, dma: false, features: vec![] };
        let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let attach = Attach { session, ring: ring.clone(), doorbell, hello, holder };
        let token = self.ask(|reply| Command::Attach { attach: Box::new(attach), reply })?;
        let namespaces = self.namespaces(session, role, own);
        let (completions, leases) = (Consumer::new(ring.queue(COMPLETIONS)), [0; 4]);
        let holder = Some(lock);
        Ok(Actor { session, token, part, ring, completions, tail: 0, asked: 0, namespaces, leases, holder })
    }

    /// Opens or joins both; a tool has none.
    fn namespaces(&mut self, session: SessionId, role: Role, part: Option<u16>) -> [u16; 2] {
        specs().map(|spec| match role {
            Role::Scheduler => {
                let spec = Box::new(spec);
                self.ask(|reply| Command::Open { session, spec, reply }).unwrap().namespace
            }
            Role::Worker | Role::Reader => {
                let digest = crate::plane::hex(&spec.digest());
                let layout = spec.parts[usize::from(part.unwrap())].layout.clone();
                let namespace = u16::from(spec.model == "two");
                self.ask(|reply| Command::Join { session, namespace, digest, layout, reply }).unwrap().namespace
            }
            Role::Tool => 0,
        })
    }

    /// Blocks that are stored and pinned in a namespace that the engine has not.
    fn seat_a_bystander(&mut self) {
        let (store, namespace) = (&mut self.plane.store, NamespaceId(9));
        let spec = NamespaceSpec { model: "bystander".into(), ..specs()[0].clone() };
        store.add_namespace(namespace, &spec).unwrap();
        let keys: Vec<BlockKey> = (0..8).map(|block| BlockKey(key(255, block))).collect();
        let mut cursor = store.reserve_begin(BYSTANDER, namespace, GroupId(0), None, 0, Ticks(0)).unwrap();
        let mut answers = Vec::new();
        store.reserve_step(&mut cursor, &keys, &mut answers);
        let lease = store.reserve_finish(cursor).lease.unwrap();
        let granted = |answer: &ReserveAnswer| match answer {
            ReserveAnswer::Granted(slot, word) => (*slot, *word, PartSum::default()),
            other => panic!("{other:?}"),
        };
        let slots: Vec<_> = answers.iter().map(granted).collect();
        for part in 0..PARTS as u16 {
            assert_eq!(store.commit(BYSTANDER, lease, PartId(part), &slots).committed, 8);
        }
        let mut cursor = store.lookup_begin(BYSTANDER, namespace, Ticks(u64::MAX / 2)).unwrap();
        store.lookup_step(&mut cursor, &keys);
        let hit = store.lookup_finish(cursor);
        assert!(hit.lease.is_some() && hit.tokens == 128);
        self.pinned.clone_from(&hit.groups[0].slots);
    }

    pub fn actor(&mut self, who: u8) -> &mut Actor {
        &mut self.actors[usize::from(who)]
    }

    /// So many turns of the plane, or until there is nothing to do. Its store is whole then, looked at ever more seldom: a
    /// look takes longer than the turns.
    pub fn turns(&mut self, most: usize) {
        let mut left = most;
        while left > 0 && self.plane.turn() {
            left -= 1;
        }
        self.pauses += 1;
        if self.pauses.is_power_of_two() {
            assert_eq!(self.plane.store.validate(), Ok(()));
        }
        self.actors.iter_mut().for_each(Actor::harvest);
    }

    /// A session hangs up; the others go on. A worker comes back, if it may.
    pub fn end(&mut self, who: u8) {
        let who = usize::from(who);
        let (session, part) = (self.actors[who].session, self.actors[who].part);
        self.actors[who].holder = None;
        self.handle.send(Command::Detach { session, fault: false });
        self.turns(1);
        if let Some(again) = (1..=PARTS).contains(&who).then(|| self.attach(Role::Worker, part)).and_then(Result::ok) {
            self.actors[who] = again;
        }
    }

    /// Everybody leaves; nothing of them is left.
    pub fn finish(mut self) -> Seen {
        self.turns(64);
        assert_eq!(self.plane.store.validate(), Ok(()));
        let before = self.plane.store.stats();
        for actor in std::mem::take(&mut self.actors) {
            self.handle.send(Command::Detach { session: actor.session, fault: false });
        }
        let watchdog = Instant::now() + Duration::from_secs(10);
        while self.plane.turn() || self.plane.store.stats().engines > 1 {
            // Entries of sessions that ended are looked at every few milliseconds.
            assert!(Instant::now() < watchdog, "an engine that left is not forgotten");
            std::thread::sleep(Duration::from_micros(500));
        }
        self.is_as_before();
        Seen {
            ended: self.faults.try_iter().count() as u64,
            committed_blocks: before.committed_blocks - self.pinned.len() as u64,
            hit_blocks: before.lookup_hit_blocks - self.pinned.len() as u64,
        }
    }

    fn is_as_before(&self) {
        let store = &self.plane.store;
        assert_eq!(store.validate(), Ok(()));
        let now = store.stats();
        assert_eq!((now.blocks_writing, now.blocks_quarantined, now.write_leases), (0, 0, 0));
        assert_eq!((now.read_leases, now.pins, now.engines), (1, 1, 1), "the bystander's are left");
        for (slot, word) in &self.pinned {
            assert_eq!(self.segment.table.record(*slot).map(|record| record.word()), Some(*word), "pinned, and gone");
        }
    }
}
