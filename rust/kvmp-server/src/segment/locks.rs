//! What the file's locks mean: byte 0's says which server has it, a holder entry's that a client may still be storing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use kvmp_core::segment::{HOLDER_ENTRY, HOLDERS, LockKind, first_locked, holder_offset, try_lock};

/// Takes the exclusive lock on byte 0: whoever has it is the server.
pub fn lock_server(file: &File) -> io::Result<bool> {
    try_lock(file, LockKind::Exclusive, 0, 1)
}

/// Whether nobody else has a byte locked.
fn byte_is_free(file: &File, offset: u64) -> io::Result<bool> {
    Ok(first_locked(file, offset, 1)?.is_none())
}

/// The holder entries, as the server sees them: which it gave out itself, which are locked by whomever.
#[derive(Debug)]
pub struct HolderLocks {
    file: File,
    next: u32,
    /// Given out only when there is no other: whoever watches for their end must not take a new holder for the old.
    spared: Vec<u32>,
}

impl HolderLocks {
    /// `file` must be a descriptor of the server's own, open for reading and writing.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file, next: 0, spared: Vec::new() }
    }

    /// Gives these entries out last.
    #[must_use]
    pub fn sparing(mut self, spared: Vec<u32>) -> Self {
        self.spared = spared;
        self
    }

    /// Whether the holder of an entry has closed it (or died). An entry that cannot be asked counts as held.
    #[must_use]
    pub fn is_free(&self, index: u32) -> bool {
        byte_is_free(&self.file, holder_offset(index)).unwrap_or(false)
    }

    /// Entries that are held now.
    pub fn held(&self) -> io::Result<Vec<u32>> {
        let end = holder_offset(HOLDERS);
        let mut held = Vec::new();
        let mut from = holder_offset(0);
        while from < end {
            let Some(at) = first_locked(&self.file, from, end - from)? else { break };
            held.push(((at - holder_offset(0)) / HOLDER_ENTRY) as u32);
            from = (at / HOLDER_ENTRY + 1) * HOLDER_ENTRY;
        }
        Ok(held)
    }

    /// Locks a free entry on a fresh open file description, which is what the client gets.
    pub fn take(&mut self, open: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<Option<(u32, OwnedFd)>> {
        let free = |spared: bool| {
            let mut all = (0..HOLDERS).map(|i| (self.next + i) % HOLDERS);
            all.find(|i| self.spared.contains(i) == spared && self.is_free(*i))
        };
        let Some(index) = free(false).or_else(|| free(true)) else { return Ok(None) };
        let fd = open()?;
        self.next = (index + 1) % HOLDERS;
        Ok(try_lock(&fd, LockKind::Shared, holder_offset(index), 1)?.then_some((index, fd)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn files() -> (tempfile::NamedTempFile, impl Fn() -> File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let path = file.path().to_owned();
        (file, move || OpenOptions::new().read(true).write(true).open(&path).unwrap())
    }

    #[test]
    fn a_spared_entry_is_given_out_last() {
        let (_file, open) = files();
        let mut holders = HolderLocks::new(open()).sparing((0..HOLDERS - 1).collect());
        let first = holders.take(|| Ok(open().into())).unwrap().unwrap();
        let second = holders.take(|| Ok(open().into())).unwrap().unwrap();
        assert_eq!((first.0, second.0), (HOLDERS - 1, 0));
    }

    #[test]
    fn one_server_at_a_time() {
        let (_file, open) = files();
        let (a, b) = (open(), open());
        assert!(lock_server(&a).unwrap());
        assert!(!lock_server(&b).unwrap());
        drop(open());
        assert!(!lock_server(&b).unwrap(), "closing another descriptor must not drop the lock");
        drop(a);
        assert!(lock_server(&b).unwrap());
    }

    #[test]
    fn an_entry_is_held_until_its_descriptor_is_closed() {
        let (_file, open) = files();
        let mut holders = HolderLocks::new(open());
        let (a, first) = holders.take(|| Ok(open().into())).unwrap().unwrap();
        let (b, second) = holders.take(|| Ok(open().into())).unwrap().unwrap();
        assert_eq!((a, b, holders.held().unwrap()), (0, 1, vec![0, 1]));
        let copy = first.try_clone().unwrap();
        drop(first);
        assert!(!holders.is_free(0), "a duplicate (a forked child's) still holds it");
        drop(copy);
        assert!(holders.is_free(0) && !holders.is_free(1));
        drop(second);
        assert_eq!(holders.held().unwrap(), Vec::<u32>::new());
    }
}
