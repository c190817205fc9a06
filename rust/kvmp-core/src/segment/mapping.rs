//! A shared mapping of a range of a file, as a raw pointer with a length.

use std::fs::File;
use std::io;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::sync::{AtomicU32, AtomicU64};

/// What a mapping may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Loads only; a store faults.
    Read,
    /// Loads and stores.
    ReadWrite,
}

/// A mapped range. Other processes may write it at any time, so no `&[u8]` is ever formed over it.
#[derive(Clone, Debug)]
pub struct Mapping {
    raw: Arc<MmapRaw>,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` (a multiple of the page size).
    pub fn new(file: &File, offset: u64, len: u64, access: Access) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut options = MmapOptions::new();
        options.offset(offset).len(len);
        let raw = match access {
            Access::Read => options.map_raw_read_only(file),
            Access::ReadWrite => options.map_raw(file),
        }?;
        Ok(Self { raw: Arc::new(raw) })
    }

    /// First byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.raw.as_mut_ptr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts private pages of zeroes in the file's place, for all clones: from then on nothing reaches the file, and no
    /// access faults because the file was made shorter.
    pub fn sever(&self) -> io::Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range is this mapping's and no other's, stays mapped under it until it is dropped, and its bytes may
        // change at any time, as they always may.
        unsafe { mmap_anonymous(self.as_ptr().cast(), self.len(), ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Ok(())
    }

    fn place(&self, offset: u64, len: usize, align: usize) -> *mut u8 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len()) && offset.is_multiple_of(align),
            "offset {offset} + {len} lies outside a mapping of {} bytes, or is not a multiple of {align}",
            self.len()
        );
        // SAFETY: offset + len was checked to lie within the mapping.
        unsafe { self.as_ptr().add(offset) }
    }

    /// The 64-bit atomic at `offset`; panics outside the mapping, which only a wrong layout can cause.
    #[must_use]
    pub fn u64_at(&self, offset: u64) -> &AtomicU64 {
        let place = self.place(offset, 8, 8).cast::<AtomicU64>();
        // SAFETY: in bounds and aligned (`place`), lives as long as `self`, and shared memory is only touched atomically.
        unsafe { &*place }
    }

    /// The 32-bit atomic at `offset`; panics outside the mapping.
    #[must_use]
    pub fn u32_at(&self, offset: u64) -> &AtomicU32 {
        let place = self.place(offset, 4, 4).cast::<AtomicU32>();
        // SAFETY: as in `u64_at`.
        unsafe { &*place }
    }

    /// `N` consecutive 64-bit atomics at `offset`; panics outside the mapping.
    #[must_use]
    pub fn u64s_at<const N: usize>(&self, offset: u64) -> &[AtomicU64; N] {
        let place = self.place(offset, 8 * N, 8).cast::<[AtomicU64; N]>();
        // SAFETY: as in `u64_at`, for N in a row.
        unsafe { &*place }
    }

    /// Copies bytes out of the mapping; panics outside it.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let from = self.place(offset, into.len(), 1);
        // SAFETY: `place` checked the range; `into` is private memory, so the ranges do not overlap. The other side may
        // write meanwhile: then the copy holds some mixture, which its reader checks like any other input.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes into a writable mapping; panics outside it.
    pub fn write(&self, offset: u64, from: &[u8]) {
        let into = self.place(offset, from.len(), 1);
        // SAFETY: as in `read`, the other way round; a read-only mapping faults, which its maker rules out.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Ordering;

    #[test]
    fn a_severed_mapping_outlives_its_file() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(8192).unwrap();
        let map = Mapping::new(&file, 0, 8192, Access::ReadWrite).unwrap();
        let clone = map.clone();
        clone.u64_at(4096).store(7, Ordering::Relaxed);
        map.sever().unwrap();
        file.set_len(0).unwrap();
        // Without the severing, this is a SIGBUS.
        assert_eq!(clone.u64_at(4096).load(Ordering::Relaxed), 0);
        clone.u64_at(0).store(1, Ordering::Relaxed);
        assert_eq!(map.u64_at(0).load(Ordering::Relaxed), 1);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
