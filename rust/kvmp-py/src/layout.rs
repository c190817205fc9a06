//! `BlockLayout`: where the bytes of a block lie in an engine's memory.

use kvmp_client::copy::Run;
use numpy::{PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use crate::arguments::flat;
use crate::errors::{from_client, invalid};
use crate::numbers::{integer, name, optional};

/// Runs of bytes of every block of some paged memory: block `b` has run `r` at `r.addr + b * r.block_stride`.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct BlockLayout {
    pub inner: kvmp_client::copy::BlockLayout,
    /// Ordinal of the GPU whose addresses these are; `None`: the host's.
    pub device: Option<u32>,
}

impl BlockLayout {
    /// Refuses a layout whose memory is elsewhere.
    pub fn check_device(&self, py: Python<'_>, device: Option<u32>) -> PyResult<()> {
        let name = |device: Option<u32>| device.map_or_else(|| "the host".into(), |ordinal| format!("GPU {ordinal}"));
        if self.device == device {
            return Ok(());
        }
        let (there, here) = (name(self.device), name(device));
        Err(invalid(py, "layout", format!("its memory is on {there}; this copies memory of {here}")))
    }
}

fn run(py: Python<'_>, row: &[i64; 4]) -> PyResult<Run> {
    let [addr, block_stride, len, part_offset] = *row;
    let size = |value: i64| usize::try_from(value).map_err(|_| invalid(py, "runs", format!("{row:?} has a negative")));
    let block_stride = isize::try_from(block_stride).map_err(|e| invalid(py, "runs", e))?;
    Ok(Run { addr: size(addr)?, block_stride, len: size(len)?, part_offset: size(part_offset)? })
}

#[pymethods]
impl BlockLayout {
    /// `runs`: int64 `(n, 4)`, rows [address, block stride, length, offset in the part], all in bytes. They must tile
    /// the part, and neither blocks nor runs may share a byte. `device`: ordinal of the GPU whose addresses they are.
    #[new]
    #[pyo3(signature = (runs, num_blocks, device=None))]
    fn new(
        py: Python<'_>,
        runs: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = integer::<name::NumBlocks, _>)] num_blocks: u32,
        #[pyo3(from_py_with = optional::<name::Device, _>)] device: Option<u32>,
    ) -> PyResult<Self> {
        let what = "an array of shape (n, 4) and dtype int64 is needed";
        let flat = flat::<i64>(runs, "runs", what, |shape| matches!(shape, [_, 4]))?;
        let runs = flat.as_chunks::<4>().0.iter().map(|row| run(py, row)).collect::<PyResult<_>>()?;
        let inner = kvmp_client::copy::BlockLayout::new(runs, num_blocks);
        Ok(Self { inner: inner.map_err(|error| from_client(py, &error.into()))?, device })
    }

    /// The runs after joining, int64 `(n, 4)`.
    #[getter]
    fn runs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let row = |run: &Run| [run.addr as i64, run.block_stride as i64, run.len as i64, run.part_offset as i64];
        let flat: Vec<i64> = self.inner.runs().iter().flat_map(row).collect();
        crate::arguments::array(py, &flat).reshape([self.inner.runs().len(), 4])
    }

    /// Blocks of the memory described.
    #[getter]
    fn num_blocks(&self) -> u32 {
        self.inner.num_blocks()
    }

    /// Ordinal of the GPU whose memory it is; None for the host's.
    #[getter]
    fn device(&self) -> Option<u32> {
        self.device
    }

    /// Bytes of one block over all runs.
    #[getter]
    fn part_bytes(&self) -> usize {
        self.inner.part_bytes()
    }
}
