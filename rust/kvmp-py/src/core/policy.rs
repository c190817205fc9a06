//! `Policy`: an eviction policy by its name, with what its caller must guarantee checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::Geometry;
use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::policy::{EvictionPolicy, POLICIES, create};
use pyo3::prelude::*;

use super::{geometry, lock, ticks};
use crate::errors::{Class, invalid, raise};
use crate::numbers::{float, integer, name, optional};

/// An eviction policy over the slots of one size.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct Policy {
    state: Mutex<State>,
    geometry: Geometry,
}

struct State {
    policy: Box<dyn EvictionPolicy>,
    /// Slots of each chunk that was added.
    chunks: BTreeMap<u32, u32>,
    tracked: BTreeSet<SlotId>,
    evictable: BTreeSet<SlotId>,
    now: Ticks,
}

impl State {
    fn tracked(&self, py: Python<'_>, name: &str, slot: u32) -> PyResult<SlotId> {
        let wrong = || invalid(py, name, format!("slot {slot} is not tracked; insert it first"));
        self.tracked.get(&SlotId(slot)).copied().ok_or_else(wrong)
    }

    fn advance(&mut self, py: Python<'_>, now_s: f64) -> PyResult<Ticks> {
        let now = ticks(py, now_s)?;
        if now < self.now {
            return Err(invalid(py, "now_s", "time never goes back"));
        }
        self.now = now;
        Ok(now)
    }
}

/// Names of the policies there are.
#[pyfunction]
pub fn policies() -> Vec<&'static str> {
    POLICIES.iter().map(|(name, _)| *name).collect()
}

#[pymethods]
impl Policy {
    /// The policy `name` for an arena of so many bytes; chunks of `chunk_bytes`, or of the size a server would choose.
    #[new]
    #[pyo3(signature = (name, arena_bytes, chunk_bytes=None))]
    fn new(
        py: Python<'_>,
        name: &str,
        #[pyo3(from_py_with = integer::<name::ArenaBytes, _>)] arena_bytes: u64,
        #[pyo3(from_py_with = optional::<name::ChunkBytes, _>)] chunk_bytes: Option<u64>,
    ) -> PyResult<Self> {
        let geometry = geometry(py, arena_bytes, chunk_bytes)?;
        let policy = create(name, &geometry).map_err(|error| invalid(py, "name", error))?;
        let (chunks, tracked, evictable) = Default::default();
        Ok(Self { state: Mutex::new(State { policy, chunks, tracked, evictable, now: Ticks(0) }), geometry })
    }

    /// Its name.
    #[getter]
    fn name(&self) -> &'static str {
        lock(&self.state).policy.name()
    }

    /// Slot numbers in a chunk: chunk `c` has those from `c * chunk_slots` on.
    #[getter]
    fn chunk_slots(&self) -> u32 {
        self.geometry.chunk_pages()
    }

    /// The first `slots` slots of a chunk are the policy's from now on.
    fn add_chunk(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Chunk, _>)] chunk: u32,
        #[pyo3(from_py_with = integer::<name::Slots, _>)] slots: u32,
    ) -> PyResult<()> {
        let mut state = lock(&self.state);
        if chunk >= self.geometry.chunks || state.chunks.contains_key(&chunk) {
            return Err(invalid(py, "chunk", format!("{chunk} is out of range or there already")));
        }
        if slots == 0 || slots > self.geometry.chunk_pages() {
            return Err(invalid(py, "slots", format!("{slots} of {} at most", self.geometry.chunk_pages())));
        }
        state.chunks.insert(chunk, slots);
        state.policy.add_chunk(ChunkId(chunk), slots);
        Ok(())
    }

    /// The chunk goes to another slot size; none of its slots may be tracked.
    fn remove_chunk(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Chunk, _>)] chunk: u32,
    ) -> PyResult<()> {
        let mut state = lock(&self.state);
        let first = chunk.saturating_mul(self.geometry.chunk_pages());
        let last = first.saturating_add(self.geometry.chunk_pages() - 1);
        if !state.chunks.contains_key(&chunk) || state.tracked.range(SlotId(first)..=SlotId(last)).next().is_some() {
            return Err(invalid(py, "chunk", format!("{chunk} is not there, or has tracked slots")));
        }
        state.chunks.remove(&chunk);
        state.policy.remove_chunk(ChunkId(chunk));
        Ok(())
    }

    /// A block was granted in `slot`, of a chunk that was added.
    fn insert(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Slot, _>)] slot: u32,
        #[pyo3(from_py_with = float::<name::NowS>)] now_s: f64,
    ) -> PyResult<()> {
        let mut state = lock(&self.state);
        let index = self.geometry.index_of(SlotId(slot));
        let slots = state.chunks.get(&(slot / self.geometry.chunk_pages())).copied().unwrap_or(0);
        if index >= slots || state.tracked.contains(&SlotId(slot)) {
            return Err(invalid(py, "slot", format!("{slot} is in no chunk that was added, or tracked already")));
        }
        let now = state.advance(py, now_s)?;
        state.tracked.insert(SlotId(slot));
        state.policy.insert(SlotId(slot), now);
        Ok(())
    }

    /// A hit ended at this block.
    fn touch(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Slot, _>)] slot: u32,
        #[pyo3(from_py_with = float::<name::NowS>)] now_s: f64,
    ) -> PyResult<()> {
        let mut state = lock(&self.state);
        let slot = state.tracked(py, "slot", slot)?;
        let now = state.advance(py, now_s)?;
        state.policy.touch(slot, now);
        Ok(())
    }

    /// The block may be evicted from now on (`yes`), or not (pinned, being written, or a resident child hangs on it).
    #[pyo3(signature = (slot, yes=true))]
    fn set_evictable(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Slot, _>)] slot: u32,
        yes: bool,
    ) -> PyResult<()> {
        let mut state = lock(&self.state);
        let slot = state.tracked(py, "slot", slot)?;
        if !yes {
            state.evictable.remove(&slot);
        } else if state.evictable.insert(slot) {
            state.policy.evictable(slot);
        }
        Ok(())
    }

    /// The block left its slot; `heir` is its parent's, where that is resident.
    #[pyo3(signature = (slot, heir=None))]
    fn remove(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Slot, _>)] slot: u32,
        #[pyo3(from_py_with = optional::<name::Heir, _>)] heir: Option<u32>,
    ) -> PyResult<()> {
        let mut state = lock(&self.state);
        let slot = state.tracked(py, "slot", slot)?;
        let heir = heir.map(|heir| state.tracked(py, "heir", heir)).transpose()?;
        state.policy.remove(slot, heir);
        state.tracked.remove(&slot);
        state.evictable.remove(&slot);
        Ok(())
    }

    /// The slot whose block goes next and when it was last used (seconds), or None where none may go.
    fn coldest(&self) -> Option<(u32, f64)> {
        let state = &mut *lock(&self.state);
        let victim = state.policy.coldest(&|slot| state.evictable.contains(&slot))?;
        Some((victim.slot.0, victim.last_use.0 as f64 / Ticks::PER_SECOND as f64))
    }

    /// Whether a new block is worth a slot that another must leave.
    fn admits(&self, py: Python<'_>, #[pyo3(from_py_with = float::<name::NowS>)] now_s: f64) -> PyResult<bool> {
        let mut state = lock(&self.state);
        let now = state.advance(py, now_s)?;
        Ok(state.policy.admits(now))
    }

    /// Recomputes what the policy believes of itself; raises KvmpError where it is wrong.
    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        let state = lock(&self.state);
        let tracked: Vec<SlotId> = state.tracked.iter().copied().collect();
        let checked = state.policy.validate(&tracked, &|slot| state.evictable.contains(&slot));
        checked.map_err(|why| raise(py, Class::Kvmp, why))
    }
}
