//! How many threads a copy takes, and how they share it.
//!
//! Scoped threads, not a pool: a start costs 26 us (measured), which is lost in copies of several MiB, and
//! nothing is left behind for a fork or an exit to trip over.

use std::num::NonZero;
use std::ops::Range;
use std::sync::OnceLock;

use kvmp_core::sync::{AtomicU64, Ordering};

/// Bytes that pay for a thread's start: at 15 GB/s they take five times as long.
const BYTES_A_THREAD: usize = 2 << 20;
/// More threads than this gain nothing on one memory controller and take cores from the engine.
const MAX_THREADS: usize = 8;
/// Bytes a thread takes at once: short enough that a thread that loses its core holds the others up little.
const PIECE: usize = 1 << 20;

/// Threads for a copy of `total` bytes when the caller does not say.
pub(super) fn threads_for(total: usize) -> usize {
    (total / BYTES_A_THREAD).clamp(1, cores().min(MAX_THREADS))
}

/// Cores this process may use; asked once, as the answer is read from the cgroup's files.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, NonZero::get))
}

/// Calls `work` on the pieces of `0..total`, each once, from `threads` threads, this one among them.
///
/// Returns when all are done. A thread that the system refuses is done without.
pub(super) fn share(total: usize, threads: usize, work: impl Fn(Range<usize>) + Sync) {
    let pieces = total.div_ceil(PIECE);
    // Relaxed: the counter only deals out pieces; the join publishes what was done with them.
    let next = AtomicU64::new(0);
    let take = || {
        let piece = next.fetch_add(1, Ordering::Relaxed) as usize;
        (piece < pieces).then(|| piece * PIECE..total.min((piece + 1) * PIECE))
    };
    let drain_queue = || std::iter::from_fn(take).for_each(&work);
    std::thread::scope(|scope| {
        for _ in 1..threads.min(pieces) {
            let builder = std::thread::Builder::new().name("kvmp-copy".into());
            if builder.spawn_scoped(scope, drain_queue).is_err() {
                break;
            }
        }
        drain_queue();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn pieces_tile_the_whole_whatever_the_threads() {
        for (total, threads) in [(0, 1), (1, 3), (PIECE, 2), (5 * PIECE + 7, 1), (5 * PIECE + 7, 4)] {
            let seen = Mutex::new(Vec::new());
            share(total, threads, |piece| seen.lock().unwrap().push((piece.start, piece.end)));
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            let ends = seen.iter().fold(0, |at, &(start, end)| if start == at { end } else { usize::MAX });
            assert_eq!(ends, total);
        }
    }

    #[test]
    fn small_copies_stay_on_the_calling_thread() {
        assert_eq!(threads_for(0), 1);
        assert_eq!(threads_for(BYTES_A_THREAD), 1);
        assert!(threads_for(usize::MAX) <= MAX_THREADS);
    }
}
