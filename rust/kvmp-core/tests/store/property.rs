//! Any calls in any order: the store does what the model allows, and `validate` holds after each.

use std::collections::{BTreeMap, VecDeque};

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::{Geometry, MIN_CHUNK};
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, LeaseId, NamespaceId, PartId, SlotId};
use kvmp_core::namespace::{GroupRule, NamespaceSpec};
use kvmp_core::policy;
use kvmp_core::slot::{PartSum, SlotState, SlotWord};
use kvmp_core::store::{BlockStore, StoreConfig, StoreStats};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRng, TestRunner};

use crate::crash::Crashes;
use crate::fixture::{group, key, spec};
use crate::logged::{Event, LoggedTable};
use crate::model::{GroupFacts, Model};

const ENGINES: u64 = 3;
pub const CHUNKS: u32 = 6;

#[derive(Clone, Debug)]
enum Op {
    Reserve { engine: u64, ns: u16, group: u16, chain: u64, first: u64, len: u64, slice: usize },
    Lookup { engine: u64, ns: u16, chain: u64, len: u64, slice: usize, keep: bool },
    Release { pick: usize },
    Commit { pick: usize, part: u16, mask: u8 },
    CommitAll { pick: usize },
    Abort { pick: usize, part: u16, mask: u8 },
    Cancel { pick: usize },
    ReadsGone { engine: u64 },
    PartGone { engine: u64, part: u16 },
    EngineGone { engine: u64 },
    Clear { ns: Option<u16> },
    Evict { n: u64 },
    Wait { seconds: u64 },
    Backed { chunk: u32 },
    BackingEnded,
    Drain,
    Crash,
    OldWritersGone,
}

fn op() -> impl Strategy<Value = Op> {
    let engine = 0..ENGINES;
    prop_oneof![
        8 => (engine.clone(), 0u16..3, 0u16..2, 0u64..4, 0u64..6, 1u64..9, 1usize..5).prop_map(
            |(engine, ns, group, chain, first, len, slice)| Op::Reserve { engine, ns, group, chain, first, len, slice }
        ),
        6 => (engine.clone(), 0u16..3, 0u64..4, 1u64..12, 1usize..5, any::<bool>())
            .prop_map(|(engine, ns, chain, len, slice, keep)| Op::Lookup { engine, ns, chain, len, slice, keep }),
        3 => any::<usize>().prop_map(|pick| Op::Release { pick }),
        4 => (any::<usize>(), 0u16..3, any::<u8>()).prop_map(|(pick, part, mask)| Op::Commit { pick, part, mask }),
        6 => any::<usize>().prop_map(|pick| Op::CommitAll { pick }),
        2 => (any::<usize>(), 0u16..3, any::<u8>()).prop_map(|(pick, part, mask)| Op::Abort { pick, part, mask }),
        1 => any::<usize>().prop_map(|pick| Op::Cancel { pick }),
        1 => engine.clone().prop_map(|engine| Op::ReadsGone { engine }),
        1 => (engine.clone(), 0u16..2).prop_map(|(engine, part)| Op::PartGone { engine, part }),
        1 => engine.prop_map(|engine| Op::EngineGone { engine }),
        1 => proptest::option::of(0u16..3).prop_map(|ns| Op::Clear { ns }),
        1 => (0u64..6).prop_map(|n| Op::Evict { n }),
        1 => (0u64..40).prop_map(|seconds| Op::Wait { seconds }),
        2 => (0u32..CHUNKS).prop_map(|chunk| Op::Backed { chunk }),
        1 => Just(Op::BackingEnded),
        1 => Just(Op::Drain),
        1 => Just(Op::Crash),
        1 => Just(Op::OldWritersGone),
    ]
}

/// What is wrong with the store under test.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    None,
    /// A commit of the last part but one makes the slot Ready.
    ReadyEarly,
    /// Pins are dropped as soon as they are given.
    NoPins,
    /// Recovery waits for no writer of the store before.
    NoQuarantine,
    /// Recovery takes every block for the head of a chain.
    NoChains,
    /// Recovery does not look at the times of the last use.
    NoTimes,
}

pub struct World {
    pub store: BlockStore<LoggedTable>,
    pub model: Model,
    pub specs: Vec<NamespaceSpec>,
    now: Ticks,
    pub fault: Fault,
    pub backed: u32,
    one_size: bool,
    pub seen: Seen,
}

/// Chains branch off chain 0 at their own place.
fn chain_key(chain: u64, position: u64) -> BlockKey {
    key(if position < chain * 2 { position } else { chain * 1000 + position })
}

fn chain_keys(chain: u64, first: u64, len: u64) -> Vec<BlockKey> {
    (first..first + len).map(|position| chain_key(chain, position)).collect()
}

fn one_size_specs() -> Vec<NamespaceSpec> {
    let prefix = || group(GroupRule::Prefix, 0, 1);
    vec![
        spec(vec![prefix()], 2, 64),
        spec(vec![prefix(), group(GroupRule::State, 0, 2)], 1, 128),
        spec(vec![group(GroupRule::Window, 40, 1)], 2, 64),
    ]
}

fn many_size_specs() -> Vec<NamespaceSpec> {
    let prefix = || group(GroupRule::Prefix, 0, 1);
    vec![
        spec(vec![prefix()], 2, 64),
        spec(vec![prefix(), group(GroupRule::Window, 40, 1)], 1, 200),
        spec(vec![prefix()], 1, 100),
    ]
}

impl World {
    fn new(one_size: bool, fault: Fault) -> Self {
        let geometry = Geometry::new(u64::from(CHUNKS) * MIN_CHUNK, Some(MIN_CHUNK)).unwrap();
        let table = LoggedTable::new(kvmp_core::store::HeapTable::new(geometry));
        let mut store = BlockStore::new(StoreConfig::new(geometry), table, policy::factory("lru").unwrap());
        let specs = if one_size { one_size_specs() } else { many_size_specs() };
        let mut groups = BTreeMap::new();
        for (ns, spec) in specs.iter().enumerate() {
            store.add_namespace(NamespaceId(ns as u16), spec).unwrap();
            for (g, group) in spec.groups.iter().enumerate() {
                let facts = GroupFacts {
                    rule: group.rule,
                    stride: group.hash_stride as usize,
                    window: group.window_tokens.div_ceil(group.block_tokens) as usize,
                    pages: u64::from(spec.slot_layout(GroupId(g as u16)).pages),
                    parts: spec.parts.len() as u16,
                };
                groups.insert((ns as u16, g as u16), facts);
            }
        }
        let cap_pages = geometry.arena_bytes() / 4096 / 2;
        let capacity = one_size.then_some(0);
        let model = Model { groups, cap_pages, capacity, warming: true, ..Model::default() };
        Self { store, model, specs, now: Ticks(0), fault, backed: 0, one_size, seen: Seen::default() }
    }

    fn run(&mut self, op: &Op) -> Result<(), String> {
        self.store.table().take_events();
        self.model.now = self.now.touched();
        self.apply(op)?;
        self.store.validate()?;
        self.compare()
    }

    /// Table and model agree on every slot, whatever the call said.
    fn compare(&self) -> Result<(), String> {
        let mut left = self.model.blocks.clone();
        for chunk in 0..CHUNKS {
            for (slot, record) in self.store.table().inner.records(ChunkId(chunk)) {
                let expected = match left.remove(&slot) {
                    None => SlotState::Free,
                    Some(block) if block.ready => SlotState::Ready,
                    Some(_) => SlotState::Writing,
                };
                if record.word.state() != Ok(expected) {
                    return Err(format!("{slot:?} is {:?}, the model says {expected:?}", record.word.state()));
                }
            }
        }
        if left.is_empty() { Ok(()) } else { Err(format!("blocks that are nowhere: {left:?}")) }
    }

    fn apply(&mut self, op: &Op) -> Result<(), String> {
        match *op {
            Op::Reserve { engine, ns, group, chain, first, len, slice } => {
                let groups = self.specs[usize::from(ns)].groups.len() as u16;
                self.reserve(EngineToken(engine), (ns, group % groups), chain, first, len, slice)
            }
            Op::Lookup { engine, ns, chain, len, slice, keep } => {
                self.lookup(EngineToken(engine), ns, &chain_keys(chain, 0, len), slice, keep)
            }
            Op::Release { pick } => self.release(pick),
            Op::Commit { pick, part, mask } => self.close(pick, part, mask, true),
            Op::CommitAll { pick } => (0..2).try_for_each(|part| self.close(pick, part, u8::MAX, true)),
            Op::Abort { pick, part, mask } => self.close(pick, part, mask, false),
            Op::Cancel { pick } => self.cancel(pick),
            Op::ReadsGone { engine } => {
                self.store.reads_gone(EngineToken(engine));
                self.model.reads.retain(|_, read| read.engine != EngineToken(engine));
                Ok(())
            }
            Op::PartGone { engine, part } => {
                self.store.part_writer_gone(EngineToken(engine), PartId(part));
                self.abort_in_model(EngineToken(engine), Some(part));
                Ok(())
            }
            Op::EngineGone { engine } => {
                self.store.engine_gone(EngineToken(engine));
                self.model.reads.retain(|_, read| read.engine != EngineToken(engine));
                self.abort_in_model(EngineToken(engine), None);
                Ok(())
            }
            Op::Clear { ns } => {
                let gone = self.store.clear(ns.map(NamespaceId));
                let expected = self.model.clear(ns);
                if gone == expected { Ok(()) } else { Err(format!("{gone} blocks cleared, not {expected}")) }
            }
            Op::Evict { n } => self.evict(n),
            Op::Wait { seconds } => {
                self.now = self.now.after(Ticks(seconds * Ticks::PER_SECOND));
                self.store.expire(self.now);
                let now = self.now;
                self.model.reads.retain(|_, read| read.expires > now);
                Ok(())
            }
            Op::Backed { chunk } => {
                self.backed(chunk);
                Ok(())
            }
            Op::BackingEnded => {
                self.store.backing_ended();
                self.model.warming = false;
                Ok(())
            }
            Op::Drain => {
                self.store.drain_some();
                self.replay_evictions(None)
            }
            Op::Crash => self.crash(),
            Op::OldWritersGone => self.old_writers_gone(),
        }
    }

    fn backed(&mut self, chunk: u32) {
        let before = self.store.stats().backed_bytes;
        self.store.chunk_backed(ChunkId(chunk));
        self.backed += u32::from(self.store.stats().backed_bytes > before);
        self.model.warming &= self.backed < CHUNKS;
        if self.one_size {
            self.model.capacity = Some(self.backed as usize * 4);
        }
    }

    fn reserve(
        &mut self,
        engine: EngineToken,
        whose: (u16, u16),
        chain: u64,
        first: u64,
        len: u64,
        slice: usize,
    ) -> Result<(), String> {
        let (ns, g) = (NamespaceId(whose.0), GroupId(whose.1));
        let prefix = self.model.groups[&whose].rule == GroupRule::Prefix;
        let parent = (prefix && first > 0).then(|| chain_key(chain, first - 1));
        let mut cursor = self.store.reserve_begin(engine, ns, g, parent, first as u32, self.now).unwrap();
        let keys = chain_keys(chain, first, len);
        let mut answers = Vec::new();
        for keys in keys.chunks(slice) {
            self.store.reserve_step(&mut cursor, keys, &mut answers);
        }
        let reply = self.store.reserve_finish(cursor);
        let lease = reply.lease.unwrap_or(LeaseId(0));
        if reply.lease.is_some() {
            self.model.writers.insert(lease, engine);
        }
        let mut before = match parent {
            None => Some(None),
            Some(parent) => self.model.find(whose, &parent).map(Some),
        };
        let (mut stopped, mut events) = (false, VecDeque::from(self.store.table().take_events()));
        for (position, (key, answer)) in (first as u32..).zip(keys.iter().zip(&answers)) {
            self.model.answered(
                engine,
                whose,
                key,
                position,
                &mut before,
                &mut stopped,
                lease,
                *answer,
                &mut events,
            )?;
        }
        if events.is_empty() && answers.len() == keys.len() { Ok(()) } else { Err(format!("left over: {events:?}")) }
    }

    fn lookup(
        &mut self,
        engine: EngineToken,
        ns: u16,
        keys: &[BlockKey],
        slice: usize,
        keep: bool,
    ) -> Result<(), String> {
        let mut cursor = self.store.lookup_begin(engine, NamespaceId(ns), self.now).unwrap();
        for keys in keys.chunks(slice) {
            if !self.store.lookup_step(&mut cursor, keys) {
                break;
            }
        }
        let reply = self.store.lookup_finish(cursor);
        let expires = self.now.after(StoreConfig::READ_TTL);
        self.model.looked_up(engine, ns, keys, &reply, expires)?;
        let Some(lease) = reply.lease else { return Ok(()) };
        if !keep || self.fault == Fault::NoPins {
            self.store.release(engine, lease);
        }
        if !keep {
            self.model.reads.remove(&lease);
        }
        Ok(())
    }

    fn release(&mut self, pick: usize) -> Result<(), String> {
        let Some((lease, read)) = nth(&self.model.reads, pick) else { return Ok(()) };
        let released = self.store.release(read.engine, lease);
        self.model.reads.remove(&lease);
        if released || self.fault == Fault::NoPins { Ok(()) } else { Err(format!("{lease:?} was not there")) }
    }

    /// Commits or aborts a part of those slots of a lease that the mask picks, also closed ones.
    fn close(&mut self, pick: usize, part: u16, mask: u8, commit: bool) -> Result<(), String> {
        let Some((lease, engine)) = nth(&self.model.writers, pick) else { return Ok(()) };
        let picked: Vec<_> = self.model.open_in(lease).into_iter().enumerate().collect();
        let picked: Vec<_> = picked.into_iter().filter(|(i, _)| mask & (1 << (i % 8)) != 0).map(|(_, b)| b).collect();
        let slots: Vec<(SlotId, SlotWord)> = picked.iter().map(|(slot, word, _)| (*slot, *word)).collect();
        let open: Vec<SlotId> = picked.iter().filter(|b| b.2.contains(&part)).map(|b| b.0).collect();
        let (done, refused) = if commit {
            self.commit(engine, lease, part, &slots)
        } else {
            let reply = self.store.abort(engine, lease, PartId(part), &slots);
            (reply.aborted, reply.refused)
        };
        // An abort may free slots of the very list: theirs are closed then.
        for slot in &open {
            if commit { self.model.commit(*slot, part) } else { self.model.abort(*slot, part) }
        }
        let counted = done as usize == open.len() && refused as usize == slots.len() - open.len();
        if counted { Ok(()) } else { Err(format!("{done} closed, {refused} refused, {} were open", open.len())) }
    }

    fn commit(&mut self, engine: EngineToken, lease: LeaseId, part: u16, slots: &[(SlotId, SlotWord)]) -> (u32, u32) {
        let sums: Vec<_> = slots.iter().map(|(slot, word)| (*slot, *word, PartSum::default())).collect();
        let reply = self.store.commit(engine, lease, PartId(part), &sums);
        if self.fault == Fault::ReadyEarly {
            self.store.commit(engine, lease, PartId(part ^ 1), &sums);
        }
        (reply.committed, reply.refused)
    }

    fn cancel(&mut self, pick: usize) -> Result<(), String> {
        let Some((lease, engine)) = nth(&self.model.writers, pick) else { return Ok(()) };
        let open = self.model.open_in(lease);
        let owned = self.store.cancel(engine, lease);
        open.iter().for_each(|(slot, _, parts)| parts.iter().for_each(|part| self.model.abort(*slot, *part)));
        if owned != open.is_empty() { Ok(()) } else { Err(format!("{lease:?} owned: {owned}, open: {open:?}")) }
    }

    fn abort_in_model(&mut self, engine: EngineToken, part: Option<u16>) {
        let leases: Vec<_> = self.model.writers.iter().filter(|(_, e)| **e == engine).map(|(id, _)| *id).collect();
        for (slot, _, parts) in leases.into_iter().flat_map(|lease| self.model.open_in(lease)).collect::<Vec<_>>() {
            for open in parts.into_iter().filter(|open| part.is_none_or(|part| part == *open)) {
                self.model.abort(slot, open);
            }
        }
    }

    fn evict(&mut self, n: u64) -> Result<(), String> {
        if !self.one_size {
            return Ok(());
        }
        let enough = self.model.all_evictable() >= n;
        let result = self.store.evict(128, n);
        let gone = self.store.table().events.borrow().len() as u64;
        if result.is_ok() != enough || gone != if enough { n } else { 0 } {
            return Err(format!("{n} to evict of {}: {result:?}, {gone} went", self.model.all_evictable()));
        }
        self.replay_evictions(None)
    }

    fn replay_evictions(&mut self, guard: Option<SlotId>) -> Result<(), String> {
        for event in self.store.table().take_events() {
            match event {
                Event::Evict(slot) => self.model.evicted(slot, guard)?,
                other => return Err(format!("{other:?} without a cause")),
            }
        }
        Ok(())
    }
}

fn nth<V: Clone>(map: &BTreeMap<LeaseId, V>, pick: usize) -> Option<(LeaseId, V)> {
    let index = pick.checked_rem(map.len())?;
    map.iter().nth(index).map(|(lease, value)| (*lease, value.clone()))
}

/// What all cases together came to: a property that never meets the rare is no property.
#[derive(Clone, Default, Debug)]
pub struct Seen {
    evictions: u64,
    pending: u64,
    no_parent: u64,
    no_space: u64,
    warming: u64,
    aborted: u64,
    chunk_moves: u64,
    recovered: u64,
    pub crashes: Crashes,
}

impl Seen {
    pub fn add(&mut self, stats: &StoreStats) {
        self.evictions += stats.evictions;
        self.pending += stats.pending;
        self.no_parent += stats.no_parent;
        self.no_space += stats.no_space;
        self.warming += stats.warming_answers;
        self.aborted += stats.aborted_parts;
        self.chunk_moves += stats.chunk_moves;
        self.recovered += stats.recovered_blocks;
    }

    fn least(&self) -> u64 {
        let seen = [self.evictions, self.pending, self.no_parent, self.no_space, self.warming, self.aborted];
        seen.into_iter().min().unwrap_or(0).min(self.recovered).min(self.crashes.least())
    }
}

/// Runs one case; what it met goes on from `seen`.
fn run_case(one_size: bool, fault: Fault, backed: u32, ops: &[Op], seen: &mut Seen) -> Result<(), String> {
    let mut world = World::new(one_size, fault);
    world.seen = seen.clone();
    (0..backed).for_each(|chunk| world.backed(chunk));
    for (step, op) in ops.iter().enumerate() {
        world.run(op).map_err(|why| format!("step {step}, {op:?}: {why}"))?;
    }
    for last in [Op::Crash, Op::OldWritersGone, Op::Clear { ns: None }] {
        world.run(&last).map_err(|why| format!("at the end, {last:?}: {why}"))?;
    }
    world.seen.add(&world.store.stats());
    *seen = world.seen;
    Ok(())
}

fn check(one_size: bool, fault: Fault, cases: u32) -> Result<Seen, String> {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(Default::default()));
    let ops = proptest::collection::vec(op(), 1..120);
    let seen = std::cell::RefCell::new(Seen::default());
    let result = runner.run(&(0..=CHUNKS, ops), |(backed, ops)| {
        run_case(one_size, fault, backed, &ops, &mut seen.borrow_mut()).map_err(TestCaseError::fail)
    });
    result.map_err(|error| error.to_string())?;
    Ok(seen.into_inner())
}

#[test]
fn one_slot_size_follows_the_model_exactly() {
    let seen = check(true, Fault::None, 1500).unwrap();
    println!("{seen:?}");
    assert!(seen.least() > 100, "too little was met: {seen:?}");
}

#[test]
fn many_slot_sizes_do_only_what_the_model_allows() {
    let seen = check(false, Fault::None, 1500).unwrap();
    println!("{seen:?}");
    assert!(seen.least() > 100 && seen.chunk_moves > 100, "too little was met: {seen:?}");
}

#[test]
fn negative_control_ready_one_part_early_is_caught() {
    check(true, Fault::ReadyEarly, 400).expect_err("the fault went unseen");
}

#[test]
fn negative_control_dropped_pins_are_caught() {
    check(true, Fault::NoPins, 400).expect_err("the fault went unseen");
}

#[test]
fn negative_control_slots_that_old_writers_may_write_are_missed() {
    check(true, Fault::NoQuarantine, 400).expect_err("the fault went unseen");
}

#[test]
fn negative_control_blocks_recovered_without_their_chain_are_caught() {
    check(false, Fault::NoChains, 400).expect_err("the fault went unseen");
}

#[test]
fn negative_control_a_recovered_order_that_is_not_of_use_is_caught() {
    check(true, Fault::NoTimes, 400).expect_err("the fault went unseen");
}
