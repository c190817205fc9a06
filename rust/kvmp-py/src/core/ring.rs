//! `Ring`: a session's two queues and scratch area in a memfd, one side of it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Mutex;

use kvmp_core::ring::{
    COMPLETIONS, Consumer, Entry, MappedQueue, Producer, RING_ENTRIES, Ring as CoreRing, SCRATCH_BYTES, SUBMISSIONS,
};
use kvmp_core::segment::{Access, Mapping};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rustix::fs::MemfdFlags;

use super::lock;
use crate::errors::{Class, invalid, raise};
use crate::numbers::{integer, name, optional};

/// One side of a shared-memory ring. A side has one producer and one consumer, so one process may attach each once.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct Ring {
    file: File,
    ring: CoreRing,
    queues: Mutex<(Producer<MappedQueue>, Consumer<MappedQueue>)>,
    side: &'static str,
}

fn make() -> std::io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("kvmp-ring", MemfdFlags::CLOEXEC)?);
    file.set_len(CoreRing::BYTES)?;
    Ok(file)
}

/// A descriptor of our own for the caller's file.
fn borrow(fd: RawFd) -> std::io::Result<File> {
    if fd < 0 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the descriptor is only duplicated, which fails on one that is not open; it is not kept.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fd.as_fd().try_clone_to_owned()?.into())
}

fn map(py: Python<'_>, file: &File) -> PyResult<CoreRing> {
    let fails = |why: String| raise(py, Class::Segment, format!("ring: {why}"));
    let found = file.metadata().map_err(|e| fails(e.to_string()))?.len();
    if found < CoreRing::BYTES {
        return Err(fails(format!("{found} bytes where {} are needed", CoreRing::BYTES)));
    }
    Mapping::new(file, 0, CoreRing::BYTES, Access::ReadWrite).map(CoreRing::new).map_err(|e| fails(e.to_string()))
}

impl Ring {
    fn check_scratch(py: Python<'_>, offset: u32, len: usize) -> PyResult<()> {
        let fits = u32::try_from(len).is_ok_and(|len| CoreRing::in_scratch(offset, len));
        let why = || format!("{offset} + {len} bytes reach beyond the {SCRATCH_BYTES} of the scratch area");
        if fits { Ok(()) } else { Err(invalid(py, "offset", why())) }
    }
}

#[pymethods]
impl Ring {
    /// Makes a ring, or attaches to the one behind the descriptor `fd`, as the side "client" or "server".
    ///
    /// Both queues must be fresh: a side keeps its own positions and starts at 0.
    #[new]
    #[pyo3(signature = (fd=None, *, side="client"))]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = optional::<name::Fd, _>)] fd: Option<RawFd>,
        side: &str,
    ) -> PyResult<Self> {
        let (to, from, side) = match side {
            "client" => (SUBMISSIONS, COMPLETIONS, "client"),
            "server" => (COMPLETIONS, SUBMISSIONS, "server"),
            other => return Err(invalid(py, "side", format!("{other:?} is neither \"client\" nor \"server\""))),
        };
        let file = fd.map_or_else(make, borrow).map_err(|e| raise(py, Class::Segment, format!("ring: {e}")))?;
        let ring = map(py, &file)?;
        let queues = Mutex::new((Producer::new(ring.queue(to)), Consumer::new(ring.queue(from))));
        Ok(Self { file, ring, queues, side })
    }

    /// Descriptor of the memory, to pass to the other side.
    fn fileno(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// "client" or "server".
    #[getter]
    fn side(&self) -> &'static str {
        self.side
    }

    /// Entries of each queue.
    #[getter]
    fn capacity(&self) -> u64 {
        RING_ENTRIES
    }

    /// Bytes of the scratch area.
    #[getter]
    fn scratch_bytes(&self) -> u64 {
        SCRATCH_BYTES
    }

    /// Fills and publishes one entry of 64 bytes towards the other side; False where the queue is full.
    ///
    /// Raises ProtocolError where the other side's position makes no sense.
    fn push(&self, py: Python<'_>, entry: &[u8]) -> PyResult<bool> {
        let wrong = || invalid(py, "entry", format!("64 bytes are needed, got {}", entry.len()));
        let (words, []) = entry.as_chunks::<8>() else { return Err(wrong()) };
        let words: Entry = <[[u8; 8]; 8]>::try_from(words).map_err(|_| wrong())?.map(u64::from_le_bytes);
        let pushed = lock(&self.queues).0.push(&words);
        Ok(pushed.map_err(|corrupt| raise(py, Class::Protocol, corrupt.to_string()))?.is_ok())
    }

    /// Takes the next entry of 64 bytes from the other side, or None where none waits.
    ///
    /// Raises ProtocolError where the other side's position makes no sense.
    fn pop<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let popped = lock(&self.queues).1.pop();
        let entry = popped.map_err(|corrupt| raise(py, Class::Protocol, corrupt.to_string()))?;
        Ok(entry.map(|entry| PyBytes::new(py, entry.map(u64::to_le_bytes).as_flattened())))
    }

    /// Copies bytes into the scratch area.
    fn write_scratch(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Offset, _>)] offset: u32,
        data: &[u8],
    ) -> PyResult<()> {
        Self::check_scratch(py, offset, data.len())?;
        self.ring.write_scratch(offset, data);
        Ok(())
    }

    /// Copies `length` bytes out of the scratch area.
    fn read_scratch<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = integer::<name::Offset, _>)] offset: u32,
        #[pyo3(from_py_with = integer::<name::Length, _>)] length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        Self::check_scratch(py, offset, length)?;
        PyBytes::new_with(py, length, |into| {
            self.ring.read_scratch(offset, into);
            Ok(())
        })
    }
}
