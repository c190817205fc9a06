//! Makes Cold chunks Free in the background: room is checked first (an allocation past a cgroup's limit kills, it
//! does not fail), then records and chunk get their memory, then their pages are zeroed through a passing mapping.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{Access, Layout, Mapping};
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;
use rustix::mm::Advice;

use crate::limits::{Bound, Sources, bounds, tightest_free};

/// Memory is taken and zeroed in steps of this many bytes, so that a stop is noticed soon.
const STEP: u64 = 16 << 20;
/// Left free for everything else on the machine, beside what is being taken.
const RESERVE: u64 = 64 << 20;
/// The index takes up to 128 bytes a slot of 4 KiB once blocks lie there: where that memory comes out of the same bound, a
/// server that leaves no room for it is killed in mid-service.
const BACKED_PER_INDEX: u64 = 32;

/// How the growth ended.
#[derive(Debug)]
pub enum Ended {
    /// Every chunk has its memory.
    Complete,
    /// The server stops.
    Stopped,
    /// There is no room for another chunk.
    NoRoom(Bound),
    /// The kernel refused.
    Failed(io::Error),
}

/// One run of the backing thread.
pub struct Backing<'a> {
    /// The segment, open for reading and writing.
    pub file: &'a File,
    /// Its offsets.
    pub layout: Layout,
    /// Folder it lies in.
    pub arena_dir: PathBuf,
    /// Where limits are read.
    pub sources: Sources,
    /// Set when the server stops.
    pub stop: &'a AtomicBool,
}

impl Backing<'_> {
    /// Backs the chunks in turn and hands each on.
    pub fn run(&self, cold: impl IntoIterator<Item = ChunkId>, mut ready: impl FnMut(ChunkId)) -> Ended {
        for chunk in cold {
            if let Some(bound) = self.lacks_room(self.layout.geometry.chunk_bytes) {
                return Ended::NoRoom(bound);
            }
            match self.back(chunk) {
                Ok(true) => ready(chunk),
                Ok(false) => return Ended::Stopped,
                Err(e) if e.kind() == io::ErrorKind::StorageFull => return self.full(),
                Err(e) => return Ended::Failed(e),
            }
        }
        Ended::Complete
    }

    fn full(&self) -> Ended {
        let all = bounds(&self.arena_dir, &self.sources);
        tightest_free(&all).cloned().map_or_else(|| Ended::Failed(io::ErrorKind::StorageFull.into()), Ended::NoRoom)
    }

    /// The bound that leaves no room for `bytes`, if one does.
    #[must_use]
    pub fn lacks_room(&self, bytes: u64) -> Option<Bound> {
        let backed = self.file.metadata().map_or(0, |meta| meta.blocks() * 512) + bytes;
        let all = bounds(&self.arena_dir, &self.sources).into_iter();
        all.filter(|bound| bound.free < bytes + reserve(bound, backed)).min_by_key(|bound| bound.free)
    }

    fn back(&self, chunk: ChunkId) -> io::Result<bool> {
        let (table, table_bytes) = self.layout.chunk_table(chunk);
        let (at, bytes) = self.layout.chunk(chunk);
        Ok(self.take(table, table_bytes)? && self.take(at, bytes)?)
    }

    /// Gives a range its memory, zeroed; `false` when the server stops.
    fn take(&self, offset: u64, bytes: u64) -> io::Result<bool> {
        let mut at = offset;
        while at < offset + bytes {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let step = STEP.min(offset + bytes - at);
            // The file has its length: one that was made shorter from outside must not grow again, with zeroes for blocks.
            retry_on_intr(|| rustix::fs::fallocate(self.file, FallocateFlags::KEEP_SIZE, at, step))?;
            self.zero(at, step)?;
            at += step;
        }
        Ok(true)
    }

    /// The kernel zeroes a page of tmpfs when it is first touched: now, so that no client pays for it.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        // A hugetlbfs maps whole huge pages only; the file ends at a multiple of them.
        let page = (rustix::fs::fstatfs(self.file)?.f_bsize as u64).max(4096);
        let (from, to) = (offset - offset % page, (offset + bytes).next_multiple_of(page));
        let map = Mapping::new(self.file, from, to - from, Access::ReadWrite)?;
        let done = retry_on_intr(|| {
            // SAFETY: the range is the whole of a mapping that outlives the call; populating changes no byte.
            unsafe { rustix::mm::madvise(map.as_ptr().cast(), map.len(), Advice::LinuxPopulateWrite) }
        });
        match done {
            // Linux before 5.14 does not know it: then pages are zeroed as they are touched.
            Err(rustix::io::Errno::INVAL) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// What is to stay free of a bound when so many bytes are backed.
fn reserve(bound: &Bound, backed: u64) -> u64 {
    // Nothing says whether others use it too, also not of a file system; of a small bound a sixteenth is enough.
    let others = RESERVE.min(bound.total / 16);
    others + if bound.is_for_all { backed / BACKED_PER_INDEX } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmp_core::geometry::Geometry;

    fn backing<'a>(file: &'a File, stop: &'a AtomicBool, layout: Layout, sources: Sources) -> Backing<'a> {
        Backing { file, layout, arena_dir: "/dev/shm".into(), sources, stop }
    }

    fn segment() -> (File, Layout) {
        let layout = Layout::new(Geometry::new(8 << 20, None).unwrap());
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        (file, layout)
    }

    #[test]
    fn every_chunk_gets_its_memory() {
        let (file, layout) = segment();
        let stop = AtomicBool::new(false);
        let mut ready = Vec::new();
        let ended = backing(&file, &stop, layout, Sources::default()).run((0..4).map(ChunkId), |c| ready.push(c.0));
        assert!(matches!(ended, Ended::Complete), "{ended:?}");
        assert_eq!(ready, [0, 1, 2, 3]);
        assert!(file.metadata().unwrap().blocks() * 512 >= 8 << 20);
    }

    #[test]
    fn a_full_cgroup_ends_the_growth_before_it_kills() {
        let (file, layout) = segment();
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in
            [("proc/self/cgroup", "0::/\n"), ("cg/memory.max", "4194304"), ("cg/memory.current", "4000000")]
        {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let sources = Sources { proc: dir.path().join("proc"), cgroup: dir.path().join("cg"), ..Sources::default() };
        let stop = AtomicBool::new(false);
        let ended = backing(&file, &stop, layout, sources).run((0..4).map(ChunkId), |_| unreachable!());
        assert!(matches!(ended, Ended::NoRoom(bound) if bound.what.contains("cgroup")));
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn a_file_made_shorter_meanwhile_is_not_made_longer() {
        let (file, layout) = segment();
        let shorter = layout.chunk(ChunkId(2)).0;
        file.set_len(shorter).unwrap();
        let (stop, mut ready) = (AtomicBool::new(false), Vec::new());
        let ended = backing(&file, &stop, layout, Sources::default()).run((0..4).map(ChunkId), |c| ready.push(c.0));
        assert!(matches!(ended, Ended::Failed(_)), "{ended:?}");
        assert_eq!((ready, file.metadata().unwrap().len()), (vec![0, 1], shorter));
    }

    #[test]
    fn a_stop_is_noticed() {
        let (file, layout) = segment();
        let stop = AtomicBool::new(true);
        let ended = backing(&file, &stop, layout, Sources::default()).run([ChunkId(0)], |_| unreachable!());
        assert!(matches!(ended, Ended::Stopped));
    }

    #[test]
    fn the_index_of_the_smallest_slots_has_room_too() {
        let bound = |total, is_for_all| Bound { what: String::new(), total, free: 0, mend: String::new(), is_for_all };
        for gib in [1, 8, 64, 1024] {
            let arena = gib << 30;
            assert!(reserve(&bound(arena, true), arena) >= RESERVE.min(arena / 16) + arena / 4096 * 128);
            assert_eq!(reserve(&bound(arena, false), arena), RESERVE);
        }
    }
}
