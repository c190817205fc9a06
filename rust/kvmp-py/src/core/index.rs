//! `BlockIndex`: the block store (index, leases, eviction) over records in private memory.

use std::sync::Mutex;

use kvmp_core::clock::Ticks;
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, LeaseId, NamespaceId, PartId, SlotId};
use kvmp_core::policy::factory;
use kvmp_core::slot::{PartSum, SlotWord};
use kvmp_core::store::{BlockStore, GroupHit, HeapTable, ReserveAnswer, StoreConfig, StoreError};
use numpy::PyArray1;
use pyo3::prelude::*;

use super::{geometry, lock, ticks};
use crate::arguments::{array, hashes, list, parent};
use crate::errors::{Class, invalid, raise};
use crate::numbers::{float, integer, name, optional};

/// The block store of a server, without the server: same rules, same answers, no shared memory.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct BlockIndex {
    store: Mutex<BlockStore<HeapTable>>,
}

/// What a lookup in a `BlockIndex` found.
#[pyclass(frozen, get_all, module = "kvmp._kvmp")]
pub struct IndexHit {
    /// Tokens that every group has.
    tokens: u32,
    /// Read lease that holds the pins, 0 for none.
    lease_id: u64,
    /// For each group: index of its first block.
    first_blocks: Vec<u32>,
    /// For each group: slot numbers, uint32.
    slots: Vec<Py<PyArray1<u32>>>,
    /// For each group: slot words, uint64.
    words: Vec<Py<PyArray1<u64>>>,
}

/// What a reserve in a `BlockIndex` granted.
#[pyclass(frozen, get_all, module = "kvmp._kvmp")]
pub struct IndexGrant {
    /// Write lease, 0 where nothing was granted.
    lease_id: u64,
    /// One answer a hash, uint8: `kvmp.client.Answer`.
    answers: Py<PyArray1<u8>>,
    /// Slot numbers, uint32; valid where granted.
    slots: Py<PyArray1<u32>>,
    /// Slot words, uint64; valid where granted.
    words: Py<PyArray1<u64>>,
}

fn keys(argument: &Bound<'_, PyAny>) -> PyResult<Vec<BlockKey>> {
    Ok(hashes(argument)?.into_iter().map(BlockKey).collect())
}

fn refused(py: Python<'_>, error: &StoreError) -> PyErr {
    raise(py, Class::Namespace, error.to_string())
}

/// Slots and words side by side.
fn named(slots: &Bound<'_, PyAny>, words: &Bound<'_, PyAny>) -> PyResult<Vec<(SlotId, SlotWord)>> {
    let py = slots.py();
    let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
    if slots.len() != words.len() {
        return Err(invalid(py, "words", format!("{} words for {} slots", words.len(), slots.len())));
    }
    Ok(slots.into_iter().map(SlotId).zip(words.into_iter().map(SlotWord)).collect())
}

fn group_slots(py: Python<'_>, hit: &GroupHit) -> Py<PyArray1<u32>> {
    array(py, &hit.slots.iter().map(|(slot, _)| slot.0).collect::<Vec<_>>()).unbind()
}

fn group_words(py: Python<'_>, hit: &GroupHit) -> Py<PyArray1<u64>> {
    array(py, &hit.slots.iter().map(|(_, word)| word.0).collect::<Vec<_>>()).unbind()
}

fn grant(py: Python<'_>, lease: Option<LeaseId>, answers: &[ReserveAnswer]) -> IndexGrant {
    let place = |answer: &ReserveAnswer| match answer {
        ReserveAnswer::Granted(slot, word) => (slot.0, word.0),
        _ => (u32::MAX, 0),
    };
    let (slots, words): (Vec<u32>, Vec<u64>) = answers.iter().map(place).unzip();
    let codes: Vec<u8> = answers.iter().map(|answer| answer.code()).collect();
    IndexGrant {
        lease_id: lease.map_or(0, |lease| lease.0),
        answers: array(py, &codes).unbind(),
        slots: array(py, &slots).unbind(),
        words: array(py, &words).unbind(),
    }
}

#[pymethods]
impl BlockIndex {
    /// A store for an arena of so many bytes, all of it backed.
    #[new]
    #[pyo3(signature = (arena_bytes, *, chunk_bytes=None, policy="lru", read_ttl_s=60.0))]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::ArenaBytes, _>)] arena_bytes: u64,
        #[pyo3(from_py_with = optional::<name::ChunkBytes, _>)] chunk_bytes: Option<u64>,
        policy: &str,
        #[pyo3(from_py_with = float::<name::ReadTtlS>)] read_ttl_s: f64,
    ) -> PyResult<Self> {
        let geometry = geometry(py, arena_bytes, chunk_bytes)?;
        let policy = factory(policy).map_err(|error| invalid(py, "policy", error))?;
        let read_ttl: Ticks = ticks(py, read_ttl_s)?;
        let mut store = BlockStore::new(StoreConfig { geometry, read_ttl }, HeapTable::new(geometry), policy);
        (0..geometry.chunks).for_each(|chunk| store.chunk_backed(ChunkId(chunk)));
        store.backing_ended();
        Ok(Self { store: Mutex::new(store) })
    }

    /// Makes a namespace (a `NamespaceSpec`, or its JSON) known under a number.
    fn add_namespace(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::NamespaceId, _>)] namespace_id: u16,
        spec: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let spec = crate::namespace::spec(spec)?;
        lock(&self.store).add_namespace(NamespaceId(namespace_id), &spec).map_err(|error| refused(py, &error))
    }

    /// The longest hit of a hash list, uint8 `(n, 32)`, pinned by a read lease.
    #[pyo3(signature = (namespace_id, hashes, *, now_s=0.0, engine=1))]
    fn lookup(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::NamespaceId, _>)] namespace_id: u16,
        hashes: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = float::<name::NowS>)] now_s: f64,
        #[pyo3(from_py_with = integer::<name::Engine, _>)] engine: u64,
    ) -> PyResult<IndexHit> {
        let (keys, now) = (keys(hashes)?, ticks(py, now_s)?);
        let mut store = lock(&self.store);
        let begun = store.lookup_begin(EngineToken(engine), NamespaceId(namespace_id), now);
        let mut cursor = begun.map_err(|error| refused(py, &error))?;
        store.lookup_step(&mut cursor, &keys);
        let reply = store.lookup_finish(cursor);
        Ok(IndexHit {
            tokens: reply.tokens,
            lease_id: reply.lease.map_or(0, |lease| lease.0),
            first_blocks: reply.groups.iter().map(|hit| hit.first_block).collect(),
            slots: reply.groups.iter().map(|hit| group_slots(py, hit)).collect(),
            words: reply.groups.iter().map(|hit| group_words(py, hit)).collect(),
        })
    }

    /// Slots for consecutive blocks `first_block..`, hashes uint8 `(n, 32)`; `parent` is the hash before the first.
    #[pyo3(signature = (namespace_id, hashes, *, first_block=0, parent=None, group=0, now_s=0.0, engine=1))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn reserve(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::NamespaceId, _>)] namespace_id: u16,
        hashes: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = integer::<name::FirstBlock, _>)] first_block: u32,
        parent: Option<&[u8]>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        #[pyo3(from_py_with = float::<name::NowS>)] now_s: f64,
        #[pyo3(from_py_with = integer::<name::Engine, _>)] engine: u64,
    ) -> PyResult<IndexGrant> {
        let (keys, now) = (keys(hashes)?, ticks(py, now_s)?);
        let parent = self::parent(py, parent)?.map(BlockKey);
        let (engine, namespace, group) = (EngineToken(engine), NamespaceId(namespace_id), GroupId(group));
        let mut store = lock(&self.store);
        let begun = store.reserve_begin(engine, namespace, group, parent, first_block, now);
        let mut cursor = begun.map_err(|error| refused(py, &error))?;
        let mut answers = Vec::with_capacity(keys.len());
        store.reserve_step(&mut cursor, &keys, &mut answers);
        let reply = store.reserve_finish(cursor);
        Ok(grant(py, reply.lease, &answers))
    }

    /// Commits a part of some slots; returns (parts committed, blocks that became readable by it).
    #[pyo3(signature = (lease_id, slots, words, *, part=0, engine=1))]
    fn commit(
        &self,
        #[pyo3(from_py_with = integer::<name::LeaseId, _>)] lease_id: u64,
        slots: &Bound<'_, PyAny>,
        words: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = integer::<name::Part, _>)] part: u16,
        #[pyo3(from_py_with = integer::<name::Engine, _>)] engine: u64,
    ) -> PyResult<(u32, u32)> {
        let sum = |(slot, word)| (slot, word, PartSum::default());
        let slots: Vec<_> = named(slots, words)?.into_iter().map(sum).collect();
        let reply = lock(&self.store).commit(EngineToken(engine), LeaseId(lease_id), PartId(part), &slots);
        Ok((reply.committed, reply.ready))
    }

    /// Gives up a part of some slots; returns how many.
    #[pyo3(signature = (lease_id, slots, words, *, part=0, engine=1))]
    fn abort(
        &self,
        #[pyo3(from_py_with = integer::<name::LeaseId, _>)] lease_id: u64,
        slots: &Bound<'_, PyAny>,
        words: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = integer::<name::Part, _>)] part: u16,
        #[pyo3(from_py_with = integer::<name::Engine, _>)] engine: u64,
    ) -> PyResult<u32> {
        let slots = named(slots, words)?;
        Ok(lock(&self.store).abort(EngineToken(engine), LeaseId(lease_id), PartId(part), &slots).aborted)
    }

    /// Gives up a whole write lease; whether there was one.
    #[pyo3(signature = (lease_id, *, engine=1))]
    fn cancel(
        &self,
        #[pyo3(from_py_with = integer::<name::LeaseId, _>)] lease_id: u64,
        #[pyo3(from_py_with = integer::<name::Engine, _>)] engine: u64,
    ) -> bool {
        lock(&self.store).cancel(EngineToken(engine), LeaseId(lease_id))
    }

    /// Ends a read lease; whether there was one.
    #[pyo3(signature = (lease_id, *, engine=1))]
    fn release(
        &self,
        #[pyo3(from_py_with = integer::<name::LeaseId, _>)] lease_id: u64,
        #[pyo3(from_py_with = integer::<name::Engine, _>)] engine: u64,
    ) -> bool {
        lock(&self.store).release(EngineToken(engine), LeaseId(lease_id))
    }

    /// Ends the read leases whose time has passed; returns how many.
    fn expire(&self, py: Python<'_>, #[pyo3(from_py_with = float::<name::NowS>)] now_s: f64) -> PyResult<u32> {
        let now = ticks(py, now_s)?;
        Ok(lock(&self.store).expire(now))
    }

    /// Evicts every block that is readable and not pinned; returns how many.
    fn clear(&self) -> u64 {
        lock(&self.store).clear(None)
    }

    /// Counters as a dict of ints.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let json = serde_json::to_string(&lock(&self.store).stats());
        let json = json.map_err(|error| raise(py, Class::Kvmp, error.to_string()))?;
        py.import("json")?.call_method1("loads", (json,))
    }

    /// Recomputes every counter and link; raises KvmpError where one is wrong.
    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        lock(&self.store).validate().map_err(|why| raise(py, Class::Kvmp, why))
    }
}
