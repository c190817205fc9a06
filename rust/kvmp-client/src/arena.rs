//! The chunks as mapped here: `Unmapped -> Mapped -> Closed`.
//!
//! The mapping, and what is populated of it, may outlive the session: a client that attaches to the same inode again
//! takes them over ([`KeptArena`]). The holder entry and the copy guards stay with their session.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvmp_core::geometry::Geometry;
use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{Access, Mapping, TableMap};

use crate::ClientError;
use crate::error::LostWhy;
use crate::prefault::Prefault;

/// Device and number. While a mapping of it exists, no other file gets them.
type Inode = (u64, u64);

fn inode(file: &File) -> Option<Inode> {
    file.metadata().ok().map(|found| (found.dev(), found.ino()))
}

/// One mapping of an arena, and which of its chunks have no page-table entries yet.
#[derive(Debug)]
pub(crate) struct ArenaMap {
    inode: Option<Inode>,
    geometry: Geometry,
    pub mapping: Mapping,
    left: Mutex<Vec<ChunkId>>,
}

impl ArenaMap {
    fn new(segment: &File, table: &TableMap) -> Result<Self, ClientError> {
        let layout = table.layout();
        let (at, len) = (layout.arena_offset(), layout.geometry.arena_bytes());
        let mapping = Mapping::new(segment, at, len, Access::ReadWrite)
            .map_err(|e| ClientError::Segment(format!("mapping {len} bytes of the arena: {e}")))?;
        let left = Mutex::new((0..layout.geometry.chunks).map(ChunkId).collect());
        Ok(Self { inode: inode(segment), geometry: layout.geometry, mapping, left })
    }

    fn is_of(&self, segment: &File, table: &TableMap) -> bool {
        self.inode.is_some()
            && self.inode == inode(segment)
            && self.mapping.len() as u64 == table.layout().geometry.arena_bytes()
    }

    fn lock_left(&self) -> MutexGuard<'_, Vec<ChunkId>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chunks that are not populated.
    pub fn left(&self) -> Vec<ChunkId> {
        self.lock_left().clone()
    }

    /// Notes a chunk as populated.
    pub fn populated(&self, chunk: ChunkId) {
        self.lock_left().retain(|&other| other != chunk);
    }
}

/// A client's mapping of its arena, for the next client of the same segment ([`crate::ConnectOptions::keep`]).
#[derive(Debug, Clone)]
pub struct KeptArena(Arc<ArenaMap>);

impl KeptArena {
    /// Whether both are one mapping.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The mapping.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.0.mapping
    }

    /// Chunks of the arena.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.0.geometry.chunks
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.0.geometry.chunk_bytes
    }

    /// Chunks that are not mapped in yet: the server has not backed and zeroed them, or [`crate::Client::prefault`] has not
    /// come to them.
    #[must_use]
    pub fn unpopulated(&self) -> Vec<u32> {
        self.0.lock_left().iter().map(|chunk| chunk.0).collect()
    }
}

#[derive(Debug)]
enum State {
    Unmapped(File),
    Mapped {
        map: Arc<ArenaMap>,
        prefault: Option<Prefault>,
    },
    /// No descriptor of the segment; the mapping only so that the next client may take it over.
    Closed(Option<Arc<ArenaMap>>),
}

/// A client's arena. One lock over mapping and populating thread: none is started once it is closed.
#[derive(Debug)]
pub(crate) struct Arena {
    table: TableMap,
    state: Mutex<State>,
}

impl Arena {
    /// The arena of a segment: as kept, if that is of the same inode, else mapped at the first ask.
    pub fn new(segment: File, table: TableMap, kept: Option<&KeptArena>) -> Self {
        let state = match kept {
            Some(KeptArena(map)) if map.is_of(&segment, &table) => State::Mapped { map: map.clone(), prefault: None },
            _ => State::Unmapped(segment),
        };
        Self { table, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map(&self, state: &mut State) -> Result<Arc<ArenaMap>, ClientError> {
        let map = match state {
            State::Mapped { map, .. } => return Ok(map.clone()),
            State::Closed(_) => return Err(ClientError::Lost(LostWhy::Closed)),
            State::Unmapped(segment) => Arc::new(ArenaMap::new(segment, &self.table)?),
        };
        *state = State::Mapped { map: map.clone(), prefault: None };
        Ok(map)
    }

    /// The mapping.
    pub fn mapping(&self) -> Result<Mapping, ClientError> {
        Ok(self.map(&mut self.lock())?.mapping.clone())
    }

    /// Starts to populate what is not; once is enough.
    pub fn prefault(&self) -> Result<(), ClientError> {
        let mut state = self.lock();
        let map = self.map(&mut state)?;
        if let State::Mapped { prefault: prefault @ None, .. } = &mut *state {
            *prefault = Prefault::start(self.table.clone(), map);
        }
        Ok(())
    }

    /// What the next client may take over; `None` where nothing was mapped.
    pub fn keep(&self) -> Option<KeptArena> {
        match &*self.lock() {
            State::Mapped { map, .. } | State::Closed(Some(map)) => Some(KeptArena(map.clone())),
            State::Unmapped(_) | State::Closed(None) => None,
        }
    }

    /// No more copies and no more populating from here on; copies under way hold the mapping themselves.
    pub fn close(&self) {
        let mut state = self.lock();
        let kept = match &*state {
            State::Mapped { map, .. } | State::Closed(Some(map)) => Some(map.clone()),
            State::Unmapped(_) | State::Closed(None) => None,
        };
        let before = std::mem::replace(&mut *state, State::Closed(kept));
        drop(state);
        if let State::Mapped { prefault: Some(prefault), .. } = before {
            prefault.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::{Populated, Touch, populate};
    use kvmp_core::geometry::Geometry;
    use kvmp_core::segment::{ChunkWord, Layout};

    fn segment() -> (File, TableMap) {
        let layout = Layout::new(Geometry::new(8 << 20, None).unwrap());
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        let map = Mapping::new(&file, 0, layout.table_bytes(), Access::ReadWrite).unwrap();
        (file, TableMap::new(map, layout))
    }

    fn arena(file: &File, table: &TableMap, kept: Option<&KeptArena>) -> Arena {
        Arena::new(file.try_clone().unwrap(), table.clone(), kept)
    }

    #[test]
    fn the_same_inode_is_not_mapped_again() {
        let (file, table) = segment();
        let first = arena(&file, &table, None);
        assert!(first.keep().is_none(), "nothing is mapped yet");
        let place = first.mapping().unwrap().as_ptr();
        let open = arena(&file, &table, first.keep().as_ref());
        first.close();
        let closed = arena(&file, &table, first.keep().as_ref());
        drop(first);
        assert_eq!((open.mapping().unwrap().as_ptr(), closed.mapping().unwrap().as_ptr()), (place, place));
        // Negative control: without it, and for another file, there is another mapping.
        assert_ne!(arena(&file, &table, None).mapping().unwrap().as_ptr(), place);
        let (other, table) = segment();
        assert_ne!(arena(&other, &table, open.keep().as_ref()).mapping().unwrap().as_ptr(), place);
    }

    #[test]
    fn what_is_populated_is_not_populated_again() {
        let (file, table) = segment();
        let first = arena(&file, &table, None);
        let chunks = table.layout().geometry.chunks;
        assert!(chunks > 1);
        table.set_chunk(ChunkId(0), ChunkWord::Free);
        if populate(first.mapping().unwrap().as_ptr(), 4096, Touch::Read, || true).unwrap() != Populated::All {
            return; // A kernel that cannot leaves nothing to keep.
        }
        first.prefault().unwrap();
        let KeptArena(map) = first.keep().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while map.left().len() == chunks as usize && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        assert_eq!(map.left(), (1..chunks).map(ChunkId).collect::<Vec<_>>());
        first.close();
        let second = arena(&file, &table, first.keep().as_ref());
        assert_eq!(second.keep().unwrap().0.left(), map.left());
    }

    #[test]
    fn nothing_populates_a_closed_arena() {
        for _ in 0..100 {
            let (file, table) = segment();
            let arena = arena(&file, &table, None);
            arena.mapping().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| arena.close());
                let _ = arena.prefault();
            });
            let KeptArena(map) = arena.keep().unwrap();
            assert_eq!(Arc::strong_count(&map), 2, "only the closed arena and this test hold it, no thread");
            assert!(matches!(arena.prefault(), Err(ClientError::Lost(LostWhy::Closed))));
        }
    }
}
