//! The arena made known to CUDA, in the background: `mapped in -> registered -> unused -> unregistered`.
//!
//! A piece is registered once the client has mapped it in, which is after the server has backed and zeroed it: that costs
//! 0.07 s a GiB, 0.28 to 0.71 where CUDA has to allocate the pages (measured on an H200). Pieces end where chunks end, so no
//! slot lies in two, as a copy over two registrations is refused by the driver.
//!
//! One thread does all of it, the unregistering and unmapping too: whoever is last to use an arena, and may hold the GIL or
//! have other copies to look after, waits for none of that.

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use kvmp_client::KeptArena;

use crate::error::Doing;
use crate::{Bell, CudaError, Device};

/// Most bytes of a piece: while one is registered (0.04 s a GiB) the driver may keep the engine's calls waiting.
const PIECE: u64 = 256 << 20;
/// Between two looks for chunks that have been mapped in meanwhile.
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(2);
/// A piece of which no more came for so long is registered as far as it is there.
const STALE: Duration = Duration::from_secs(2);

/// What of an arena is registered. Copies under way hold it; once nobody does, the arena is unregistered, in the background.
#[derive(Debug)]
pub struct Registered {
    /// Goes before the next field: so the thread that sees that end is the last to hold the arena, and unmaps it.
    known: Arc<Known>,
    _in_use: Sender<Infallible>,
}

/// The arena, and what the GPU knows of it.
#[derive(Debug)]
struct Known {
    device: Arc<Device>,
    arena: KeptArena,
    /// For each chunk its address as the GPU sees it, once it is registered.
    chunks: RwLock<Vec<Option<u64>>>,
    failure: Mutex<Option<String>>,
}

impl Registered {
    /// Bytes registered so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.known.addresses().iter().flatten().count() as u64 * self.known.arena.chunk_bytes()
    }

    /// Bytes of the arena.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        u64::from(self.known.arena.chunks()) * self.known.arena.chunk_bytes()
    }

    /// Why there will be no more; copies of the rest are slower.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.known.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Addresses, as the GPU sees them, of places in the arena; `None` where a place is not registered.
    pub(crate) fn locate(&self, offsets: impl Iterator<Item = u64>) -> Vec<Option<u64>> {
        let (chunks, chunk_bytes) = (self.known.addresses(), self.known.arena.chunk_bytes());
        let of = |offset: u64| chunks.get((offset / chunk_bytes) as usize).copied().flatten();
        offsets.map(|offset| of(offset).map(|address| address + offset % chunk_bytes)).collect()
    }
}

impl Known {
    fn new(device: Arc<Device>, arena: KeptArena) -> Self {
        let chunks = RwLock::new(vec![None; arena.chunks() as usize]);
        Self { device, arena, chunks, failure: Mutex::default() }
    }

    fn addresses(&self) -> RwLockReadGuard<'_, Vec<Option<u64>>> {
        self.chunks.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers neighbouring chunks as one piece.
    fn register(&self, first: usize, count: usize, pieces: &mut Vec<Piece>) -> Result<(), CudaError> {
        let _here = self.device.enter()?;
        let chunk_bytes = self.arena.chunk_bytes() as usize;
        let host = self.arena.mapping().as_ptr().wrapping_add(first * chunk_bytes);
        let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the range is this arena's mapping, which lives until the piece is unregistered.
        unsafe { sys::cuMemHostRegister_v2(host.cast(), count * chunk_bytes, flags) }
            .result()
            .doing("registering the arena")?;
        pieces.push(Piece { address: host.addr() });
        let mut seen: sys::CUdeviceptr = 0;
        // SAFETY: a place for the address, and memory that was just registered.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut seen, host.cast(), 0) }
            .result()
            .doing("asking where the GPU sees the arena")?;
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        for at in 0..count {
            chunks[first + at] = Some(seen + (at * chunk_bytes) as u64);
        }
        Ok(())
    }

    /// Unregisters what nobody uses any more.
    fn unregister(&self, pieces: &[Piece]) {
        let Ok(_here) = self.device.enter() else { return };
        for piece in pieces {
            // SAFETY: registered at this address, once; no copy is under way, as each holds a `Registered`.
            let _ = unsafe { sys::cuMemHostUnregister(std::ptr::with_exposed_provenance_mut(piece.address)) };
        }
    }
}

#[derive(Debug)]
struct Piece {
    address: usize,
}

/// An arena's registration, as long as copies of it may be begun.
///
/// Dropped, it waits until all is unregistered, but where a copy is under way: then that goes on, and the rest comes behind
/// it, in the background.
#[derive(Debug)]
pub struct Registration {
    stop: Arc<Bell>,
    /// Goes before the thread, which waits for that.
    registered: Arc<Registered>,
    thread: Thread,
}

impl Registration {
    /// Begins; where the system refuses a thread, nothing is registered and copies are slower.
    #[must_use]
    pub fn start(device: Arc<Device>, arena: KeptArena) -> Self {
        let known = Arc::new(Known::new(device, arena));
        let stop = Arc::new(Bell::default());
        let (in_use, unused) = channel();
        let (work, asked) = (Arc::clone(&known), Arc::clone(&stop));
        let thread =
            std::thread::Builder::new().name("kvmp-register".into()).spawn(move || live(&work, &asked, &unused));
        let registered = Arc::new(Registered { known, _in_use: in_use });
        Self { stop, registered, thread: Thread { handle: thread.ok(), process: std::process::id() } }
    }

    /// Whether this is of that arena: then it is kept, also over a restart of the server.
    #[must_use]
    pub fn is_of(&self, arena: &KeptArena) -> bool {
        self.registered.known.arena.is_same(arena)
    }

    /// What is registered.
    #[must_use]
    pub fn registered(&self) -> &Arc<Registered> {
        &self.registered
    }

    /// Ends it without a wait: all is unregistered in the background, once the copies under way have ended.
    pub fn retire(mut self) {
        self.thread.detach();
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.stop.ring();
        let is_copied = Arc::strong_count(&self.registered) > 1;
        if is_copied {
            self.thread.detach();
        }
    }
}

/// Joined when it goes, unless it was detached, or this is a forked child: there it does not run.
#[derive(Debug)]
struct Thread {
    handle: Option<JoinHandle<()>>,
    process: u32,
}

impl Thread {
    fn detach(&mut self) {
        self.handle = None;
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(thread) = self.handle.take().filter(|_| self.process == std::process::id()) {
            // A panic there has left nothing undone that a copy needs.
            let _ = thread.join();
        }
    }
}

/// The thread of one arena, from its first piece to its last.
fn live(known: &Known, stop: &Bell, unused: &Receiver<Infallible>) {
    let mut pieces = Vec::new();
    if let Err(error) = register_all(known, stop, &mut pieces) {
        *known.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
    let Err(_) = unused.recv();
    known.unregister(&pieces);
}

fn register_all(known: &Known, stop: &Bell, pieces: &mut Vec<Piece>) -> Result<(), CudaError> {
    let mut progress = Progress::default();
    let mut pause = SHORTEST;
    loop {
        let chunks = known.addresses().clone();
        let left = known.arena.unpopulated();
        let is_new = new_chunks(&chunks, &left);
        let is_stale = progress.is_stale(left.len());
        let per_piece = (PIECE / known.arena.chunk_bytes()).max(1) as usize;
        let found = runs_of(&is_new, &chunks, per_piece, is_stale);
        for &(first, count) in &found {
            if stop.wait(Some(Duration::ZERO)) {
                return Ok(());
            }
            known.register(first, count, pieces)?;
        }
        pause = if found.is_empty() { (2 * pause).min(LONGEST) } else { SHORTEST };
        if known.addresses().iter().all(Option::is_some) || stop.wait(Some(pause)) {
            return Ok(());
        }
    }
}

/// Chunks that are mapped in and not registered. An arena may have tens of thousands.
fn new_chunks(registered: &[Option<u64>], left: &[u32]) -> Vec<bool> {
    let mut is_new: Vec<bool> = registered.iter().map(Option::is_none).collect();
    for &chunk in left {
        is_new[chunk as usize] = false;
    }
    is_new
}

/// Since when no more chunks have been mapped in.
#[derive(Default)]
struct Progress(Option<(usize, Instant)>);

impl Progress {
    fn is_stale(&mut self, left: usize) -> bool {
        match self.0 {
            Some((before, since)) if before == left => left == 0 || since.elapsed() >= STALE,
            _ => {
                self.0 = Some((left, Instant::now()));
                left == 0
            }
        }
    }
}

/// Runs of new chunks (first, count) to register now: whole groups of `per_piece`, and if no more is to be expected
/// whatever there is of a group.
fn runs_of(is_new: &[bool], done: &[Option<u64>], per_piece: usize, is_stale: bool) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (group, chunks) in is_new.chunks(per_piece).enumerate() {
        let first = group * per_piece;
        let is_whole = chunks.iter().zip(&done[first..]).all(|(new, done)| *new || done.is_some());
        if !is_whole && !is_stale {
            continue;
        }
        let mut at = 0;
        for run in chunks.chunk_by(|a, b| a == b) {
            if run[0] {
                found.push((first + at, run.len()));
            }
            at += run.len();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_in_and_not_registered_is_new() {
        assert_eq!(new_chunks(&[None, Some(1), None, None], &[2]), [true, false, false, true]);
    }

    #[test]
    fn whole_groups_come_first_and_the_rest_when_no_more_is_expected() {
        let none = [None; 8];
        let new = [true, true, true, true, true, false, true, false];
        assert_eq!(runs_of(&new, &none, 4, false), [(0, 4)]);
        assert_eq!(runs_of(&new, &none, 4, true), [(0, 4), (4, 1), (6, 1)]);
        // Nothing twice: of a group of which a part is registered, the rest is one more piece.
        let done = [None, None, None, None, Some(1), None, Some(1), None];
        let rest = [false, false, false, false, false, true, false, true];
        assert_eq!(runs_of(&rest, &done, 4, false), [(5, 1), (7, 1)]);
        assert!(runs_of(&[false; 8], &none, 4, true).is_empty());
        assert_eq!(runs_of(&[true; 3], &none[..3], 2, false), [(0, 2), (2, 1)]);
    }
}
