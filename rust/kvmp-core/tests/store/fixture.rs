//! A store over a [`HeapTable`] with small arenas, and the calls of one slice in one.

use std::collections::BTreeMap;

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::{Geometry, MIN_CHUNK, PAGE};
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, LeaseId, NamespaceId, PartId, SlotId};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::policy;
use kvmp_core::slot::{PartSum, SlotWord};
use kvmp_core::store::{
    BlockStore, ChunkState, CommitReply, FoundRecord, HeapRecord, HeapTable, LookupReply, Recovered, ReserveAnswer,
    ReserveReply, SlotTable, StoreConfig,
};

pub const NS: NamespaceId = NamespaceId(0);
pub const G0: GroupId = GroupId(0);
pub const ENGINE: EngineToken = EngineToken(1);
pub const OTHER: EngineToken = EngineToken(2);

/// Slots of this size: a chunk of 2 MiB holds so many.
pub fn slots_a_chunk(pages: u64) -> u64 {
    MIN_CHUNK / PAGE / pages
}

pub fn key(n: u64) -> BlockKey {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    BlockKey(bytes)
}

pub fn keys(range: std::ops::Range<u64>) -> Vec<BlockKey> {
    range.map(key).collect()
}

pub fn at(seconds: u64) -> Ticks {
    Ticks(seconds * Ticks::PER_SECOND)
}

pub fn group(rule: GroupRule, window_tokens: u32, hash_stride: u32) -> GroupSpec {
    GroupSpec { rule, block_tokens: 16 * hash_stride, window_tokens, hash_stride }
}

/// Each part takes `pages` pages in every group.
pub fn spec(groups: Vec<GroupSpec>, parts: usize, pages: u64) -> NamespaceSpec {
    let bytes = vec![pages * PAGE; groups.len()];
    let part = PartSpec { bytes, layout: serde_json::Value::Null };
    NamespaceSpec { model: "m".into(), facts: BTreeMap::new(), groups, parts: vec![part; parts], salt: String::new() }
}

pub fn prefix_spec(parts: usize, pages: u64) -> NamespaceSpec {
    spec(vec![group(GroupRule::Prefix, 0, 1)], parts, pages)
}

pub fn new_store(table: HeapTable) -> BlockStore<HeapTable> {
    BlockStore::new(StoreConfig::new(table.geometry()), table, policy::factory("lru").unwrap())
}

pub fn cold_store(chunks: u64) -> BlockStore<HeapTable> {
    let geometry = Geometry::new(chunks * MIN_CHUNK, Some(MIN_CHUNK)).unwrap();
    new_store(HeapTable::new(geometry))
}

/// All chunks backed, one prefix namespace.
pub fn store(chunks: u64, parts: usize, pages: u64) -> BlockStore<HeapTable> {
    let mut store = cold_store(chunks);
    (0..chunks).for_each(|chunk| store.chunk_backed(ChunkId(chunk as u32)));
    store.add_namespace(NS, &prefix_spec(parts, pages)).unwrap();
    store
}

/// A new store over the table of one that is gone; `specs` by namespace number.
pub fn recovered(table: HeapTable, specs: &[NamespaceSpec]) -> (BlockStore<HeapTable>, Recovered) {
    let found = found_everywhere(&table);
    let mut store = new_store(table);
    let report = recover(&mut store, found, specs);
    (store, report)
}

/// What a recovery finds: each chunk's state and records.
pub type FoundChunks = Vec<(ChunkId, ChunkState, Vec<FoundRecord>)>;

pub fn found_everywhere(table: &HeapTable) -> FoundChunks {
    let chunks = (0..table.geometry().chunks).map(ChunkId);
    chunks.map(|chunk| (chunk, table.chunk(chunk).unwrap(), found_in(table, chunk))).collect()
}

/// Has a new store recover what was found.
pub fn recover<T: SlotTable>(store: &mut BlockStore<T>, found: FoundChunks, specs: &[NamespaceSpec]) -> Recovered {
    for (id, spec) in specs.iter().enumerate() {
        store.add_namespace(NamespaceId(id as u16), spec).unwrap();
    }
    store.recover_begin(found.iter().map(|(_, _, records)| records.len() as u64).sum());
    for (chunk, state, records) in found {
        match state {
            ChunkState::Cold => {}
            ChunkState::Free => store.chunk_backed(chunk),
            ChunkState::Assigned { pages } | ChunkState::Draining { pages } => {
                store.recover_chunk(chunk, pages, records).unwrap();
            }
        }
    }
    store.recover_finish()
}

/// What a recovery finds in a chunk.
pub fn found_in(table: &HeapTable, chunk: ChunkId) -> Vec<FoundRecord> {
    let found = |(slot, record): (SlotId, &HeapRecord)| FoundRecord {
        slot,
        word: record.word,
        identity: record.identity,
        touched: record.touched,
    };
    table.records(chunk).map(found).collect()
}

pub type Granted = Vec<(SlotId, SlotWord)>;

pub fn granted(answers: &[ReserveAnswer]) -> Granted {
    let slots = answers.iter().filter_map(|answer| match answer {
        ReserveAnswer::Granted(slot, word) => Some((*slot, *word)),
        _ => None,
    });
    slots.collect()
}

/// One char an answer: G P W(pending) n(no parent) s(no space) a(not admitted) w(warming).
pub fn letters(answers: &[ReserveAnswer]) -> String {
    answers.iter().map(|answer| char::from(b"GPWnsaw"[usize::from(answer.code())])).collect()
}

/// The calls of one engine on one namespace, unsliced.
pub trait Calls {
    fn reserve_as(
        &mut self,
        who: EngineToken,
        parent: Option<u64>,
        first: u32,
        keys: &[BlockKey],
        now: Ticks,
    ) -> (ReserveReply, Vec<ReserveAnswer>);
    fn lookup_as(&mut self, who: EngineToken, keys: &[BlockKey], now: Ticks) -> LookupReply;
    fn commit_part(&mut self, lease: LeaseId, part: u16, slots: &[(SlotId, SlotWord)]) -> CommitReply;

    fn reserve(&mut self, keys: &[BlockKey], now: Ticks) -> (ReserveReply, Vec<ReserveAnswer>) {
        self.reserve_as(ENGINE, None, 0, keys, now)
    }

    fn lookup(&mut self, keys: &[BlockKey], now: Ticks) -> LookupReply {
        self.lookup_as(ENGINE, keys, now)
    }

    /// Reserves and commits a chain (one part a slot); returns the answers' letters.
    fn fill(&mut self, parent: Option<u64>, first: u32, keys: &[BlockKey], now: Ticks) -> String {
        let (reply, answers) = self.reserve_as(ENGINE, parent, first, keys, now);
        if let Some(lease) = reply.lease {
            let done = self.commit_part(lease, 0, &granted(&answers));
            assert_eq!(done.ready, reply.granted);
        }
        letters(&answers)
    }

    /// Tokens of a hit that is released at once.
    fn hit(&mut self, keys: &[BlockKey], now: Ticks) -> u32;
}

impl Calls for BlockStore<HeapTable> {
    fn reserve_as(
        &mut self,
        who: EngineToken,
        parent: Option<u64>,
        first: u32,
        keys: &[BlockKey],
        now: Ticks,
    ) -> (ReserveReply, Vec<ReserveAnswer>) {
        let mut cursor = self.reserve_begin(who, NS, G0, parent.map(key), first, now).unwrap();
        let mut answers = Vec::new();
        self.reserve_step(&mut cursor, keys, &mut answers);
        (self.reserve_finish(cursor), answers)
    }

    fn lookup_as(&mut self, who: EngineToken, keys: &[BlockKey], now: Ticks) -> LookupReply {
        let mut cursor = self.lookup_begin(who, NS, now).unwrap();
        self.lookup_step(&mut cursor, keys);
        self.lookup_finish(cursor)
    }

    fn commit_part(&mut self, lease: LeaseId, part: u16, slots: &[(SlotId, SlotWord)]) -> CommitReply {
        let slots: Vec<_> = slots.iter().map(|(slot, word)| (*slot, *word, PartSum::default())).collect();
        self.commit(ENGINE, lease, PartId(part), &slots)
    }

    fn hit(&mut self, keys: &[BlockKey], now: Ticks) -> u32 {
        let reply = self.lookup(keys, now);
        if let Some(lease) = reply.lease {
            assert!(self.release(ENGINE, lease));
        }
        reply.tokens
    }
}
