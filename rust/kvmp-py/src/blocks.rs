//! Copies: `Client.store_blocks`, `Client.load_blocks`.

use kvmp_client::{ClientError, PartsAt};
use numpy::PyArray1;
use pyo3::prelude::*;

use crate::arguments::{array, list};
use crate::client::Client;
use crate::errors::{OrRaise, invalid};
use crate::layout::BlockLayout;
use crate::namespace::Namespace;
use crate::numbers::{integer, name, optional};

/// Copies of more bytes give the GIL away.
const KEEP_GIL_BYTES: u64 = 64 << 10;

/// Block ids as copies take them.
pub fn block_ids(argument: &Bound<'_, PyAny>, num_blocks: u32) -> PyResult<Vec<u32>> {
    let bad = |id| invalid(argument.py(), "block_ids", format!("{id} is out of range: there are {num_blocks} blocks"));
    let ids = list::<i64>(argument, "block_ids")?;
    ids.into_iter().map(|id| u32::try_from(id).ok().filter(|&id| id < num_blocks).ok_or_else(|| bad(id))).collect()
}

fn copying<T: Send>(py: Python<'_>, at: &PartsAt, copy: impl FnOnce() -> Result<T, ClientError> + Send) -> PyResult<T> {
    let bytes = at.bytes.saturating_mul(at.offsets.len() as u64);
    if bytes <= KEEP_GIL_BYTES { copy() } else { py.detach(copy) }.or_raise(py)
}

#[pymethods]
impl Client {
    /// Copies blocks of paged memory into this client's part of slots; returns when all bytes are there.
    ///
    /// block_ids int64 `(n,)`, slots uint32 `(n,)`. An open write lease of the namespace's server epoch must cover
    /// the slots; `server_epoch`, where given, is the lease's and is compared.
    #[pyo3(signature = (layout, namespace, group, block_ids, slots, threads=None, server_epoch=None))]
    #[expect(clippy::too_many_arguments, reason = "arguments of Python")]
    fn store_blocks(
        &self,
        py: Python<'_>,
        layout: &BlockLayout,
        namespace: &Namespace,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        block_ids: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = optional::<name::Threads, _>)] threads: Option<usize>,
        #[pyo3(from_py_with = optional::<name::ServerEpoch, _>)] server_epoch: Option<u64>,
    ) -> PyResult<()> {
        layout.check_device(py, None)?;
        let (blocks, slots) = (self::block_ids(block_ids, layout.inner.num_blocks())?, list::<u32>(slots, "slots")?);
        server_epoch.map_or(Ok(()), |epoch| self.inner.check_epoch(epoch)).or_raise(py)?;
        let at = self.inner.parts_at(&namespace.inner, group, &slots).or_raise(py)?;
        copying(py, &at, || {
            // SAFETY: Python's caller vouches for the memory that the layout names (it holds the tensors) and for the
            // lease.
            unsafe { self.inner.store_blocks(&layout.inner, &at, &blocks, threads) }
        })
    }

    /// xxh3-64 of this client's part of each slot as it lies in the arena, uint64 `(n,)`: for `commit`, once the store
    /// has ended. slots uint32 `(n,)`.
    fn part_sums<'py>(
        &self,
        py: Python<'py>,
        namespace: &Namespace,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        slots: &Bound<'_, PyAny>,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let at = self.inner.parts_at(&namespace.inner, group, &list::<u32>(slots, "slots")?).or_raise(py)?;
        Ok(array(py, &copying(py, &at, || Ok(self.inner.xxh3_of(&at)))?))
    }

    /// Compares this client's part of each slot with the sum of its commit: uint8 `(n,)`, 0 intact, 1 the slot is not
    /// the one leased any more, 2 its bytes are not those committed (or had no sum).
    ///
    /// slots uint32 `(n,)`, words uint64 `(n,)`.
    fn check_sums<'py>(
        &self,
        py: Python<'py>,
        namespace: &Namespace,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        slots: &Bound<'_, PyAny>,
        words: &Bound<'_, PyAny>,
    ) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
        let at = self.inner.parts_at(&namespace.inner, group, &slots).or_raise(py)?;
        let found = copying(py, &at, || self.inner.check_sums(&at, &slots, &words))?;
        Ok(array(py, &found.into_iter().map(|check| check as u8).collect::<Vec<_>>()))
    }

    /// Copies this client's part of slots into blocks of paged memory, then checks the slot words: bool `(n,)`, False
    /// where the slot was not the one leased during the whole copy and the block holds garbage.
    ///
    /// block_ids int64 `(n,)`, slots uint32 `(n,)`, words uint64 `(n,)`.
    #[pyo3(signature = (layout, namespace, group, block_ids, slots, words, threads=None))]
    #[expect(clippy::too_many_arguments, reason = "arguments of Python")]
    fn load_blocks<'py>(
        &self,
        py: Python<'py>,
        layout: &BlockLayout,
        namespace: &Namespace,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
        block_ids: &Bound<'py, PyAny>,
        slots: &Bound<'py, PyAny>,
        words: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = optional::<name::Threads, _>)] threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray1<bool>>> {
        layout.check_device(py, None)?;
        let blocks = self::block_ids(block_ids, layout.inner.num_blocks())?;
        let (slots, words) = (list::<u32>(slots, "slots")?, list::<u64>(words, "words")?);
        let at = self.inner.parts_at(&namespace.inner, group, &slots).or_raise(py)?;
        let ok = copying(py, &at, || {
            // SAFETY: Python's caller vouches for the memory that the layout names.
            unsafe { self.inner.load_blocks(&layout.inner, &at, &blocks, &slots, &words, threads) }
        })?;
        Ok(array(py, &ok))
    }
}
