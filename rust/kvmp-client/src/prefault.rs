//! Page-table entries of the arena's mapping, made in the background after attach, chunk by chunk as memory comes.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{ChunkWord, Mapping, TableMap};

use crate::copy::{Populated, Touch, populate};

/// Between two looks for chunks that have got memory meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Whether the thread is to end.
#[derive(Debug, Default)]
struct Stop {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_asked(&self) -> bool {
        *self.lock()
    }

    /// Sleeps a while, or until asked to end.
    fn pause(&self) {
        // Whether it was time or the ask that ended the pause is asked for anew.
        drop(self.changed.wait_timeout_while(self.lock(), LOOK_AGAIN, |asked| !*asked));
    }
}

/// The thread, from attach until every chunk is mapped in or the client closes.
#[derive(Debug)]
pub(crate) struct Prefault {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
}

impl Prefault {
    /// Starts it; where the system refuses a thread, the first copies take the faults.
    pub fn start(table: TableMap, arena: Mapping) -> Option<Self> {
        let stop = Arc::new(Stop::default());
        let asked = stop.clone();
        let work = move || map_in_all(&table, &arena, &asked);
        let thread = std::thread::Builder::new().name("kvmp-prefault".into()).spawn(work).ok()?;
        Some(Self { stop, thread })
    }

    /// Ends it, within the few milliseconds that a step takes.
    pub fn end(self) {
        *self.stop.lock() = true;
        self.stop.changed.notify_all();
        // A panic there has left nothing undone that a copy needs.
        let _ = self.thread.join();
    }
}

fn map_in_all(table: &TableMap, arena: &Mapping, stop: &Stop) {
    let mut left: Vec<ChunkId> = (0..table.layout().geometry.chunks).map(ChunkId).collect();
    while !left.is_empty() && !stop.is_asked() {
        let mut unsupported = false;
        left.retain(|&chunk| {
            let backed = !matches!(table.chunk(chunk), None | Some(ChunkWord::Cold));
            let done = backed && map_in(table, arena, chunk, stop);
            unsupported |= backed && !done;
            !done
        });
        if unsupported {
            return;
        }
        if !left.is_empty() {
            stop.pause();
        }
    }
}

/// Whether all of a chunk is mapped in; otherwise there is no use in going on.
fn map_in(table: &TableMap, arena: &Mapping, chunk: ChunkId, stop: &Stop) -> bool {
    let bytes = table.layout().geometry.chunk_bytes as usize;
    let at = arena.as_ptr().wrapping_add(chunk.0 as usize * bytes);
    matches!(populate(at, bytes, Touch::Read, || !stop.is_asked()), Ok(Populated::All))
}
