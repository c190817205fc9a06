//! Page-table entries of the arena's mapping, made in the background after attach, chunk by chunk as memory comes.

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{ChunkWord, TableMap};

use crate::arena::ArenaMap;
use crate::copy::{Populated, Touch, populate};

/// Between two looks for chunks that have got memory meanwhile: at first, and where none has for long (a server that ran
/// out of room backs no more for as long as it lives).
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(5);

/// Pauses that double as long as nothing new is found.
#[derive(Debug)]
struct Pace(Duration);

impl Pace {
    fn next(&mut self, found: bool) -> Duration {
        let pause = if found { SHORTEST } else { self.0 };
        self.0 = (2 * pause).min(LONGEST);
        pause
    }
}

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
    fn pause(&self, limit: Duration) {
        // Whether it was time or the ask that ended the pause is asked for anew.
        drop(self.changed.wait_timeout_while(self.lock(), limit, |asked| !*asked));
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
    pub fn start(table: TableMap, arena: Arc<ArenaMap>) -> Option<Self> {
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

fn map_in_all(table: &TableMap, arena: &ArenaMap, stop: &Stop) {
    let mut pace = Pace(SHORTEST);
    while let ControlFlow::Continue(found) = map_in_backed(table, arena, stop) {
        stop.pause(pace.next(found));
    }
}

/// Maps in every chunk that has memory and is left; whether there was one. Breaks where there is no use in going on.
fn map_in_backed(table: &TableMap, arena: &ArenaMap, stop: &Stop) -> ControlFlow<(), bool> {
    let is_cold = |chunk: &ChunkId| matches!(table.chunk(*chunk), None | Some(ChunkWord::Cold));
    let (cold, backed): (Vec<_>, Vec<_>) = arena.left().into_iter().partition(is_cold);
    let found = !backed.is_empty();
    for chunk in backed {
        if !map_in(table, arena, chunk, stop) {
            return ControlFlow::Break(());
        }
        arena.populated(chunk);
    }
    if cold.is_empty() || stop.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(found) }
}

/// Whether all of a chunk is mapped in, or will be by the first copies where the kernel is too old for more.
fn map_in(table: &TableMap, arena: &ArenaMap, chunk: ChunkId, stop: &Stop) -> bool {
    let bytes = table.layout().geometry.chunk_bytes as usize;
    let at = arena.mapping.as_ptr().wrapping_add(chunk.0 as usize * bytes);
    matches!(populate(at, bytes, Touch::Read, || !stop.is_asked()), Ok(Populated::All | Populated::Unsupported))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_get_rare_where_no_memory_comes() {
        let mut pace = Pace(SHORTEST);
        let pauses: Vec<Duration> = (0..12).map(|_| pace.next(false)).collect();
        assert_eq!(pauses[0], SHORTEST);
        assert!(pauses.windows(2).all(|two| two[1] == (2 * two[0]).min(LONGEST)));
        assert_eq!(pauses[11], LONGEST);
        assert_eq!((pace.next(true), pace.next(false)), (SHORTEST, 2 * SHORTEST));
    }
}
