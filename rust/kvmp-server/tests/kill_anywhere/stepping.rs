//! A life taken through one call on the table instruction by instruction, by `ptrace`, and killed at the first instruction
//! after the table's n-th change: a kill between two others leaves what the kill before it does.

use std::fs::File;
use std::sync::atomic::Ordering;

use kvmp_core::geometry::Geometry;
use kvmp_core::ids::{PartId, SlotId};
use kvmp_core::segment::{Access, ChunkWord, Layout, Mapping, TableMap};
use kvmp_core::slot::PartSum;
use rustix::process::Pid;

use super::kills::{Kills, wait_for_thread};
use super::page::Call;
use super::witness::Verdict;

/// More than any call takes.
const STEPS_MOST: u64 = 100_000;
const NULL: *mut libc::c_void = std::ptr::null_mut();
/// In the page's place for a thread: it may not be traced here.
pub const NOT_TRACED: u64 = u64::MAX;

/// How far a call came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stepped {
    pub instructions: u64,
    /// Changes of the table.
    pub changes: u64,
    pub finished: bool,
}

/// Lets this thread be traced by the one that started its process; false where that is not allowed.
pub fn be_traced() -> bool {
    // SAFETY: no pointer is passed; it changes who is told of this thread's signals, which is what the test is for.
    let done = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, NULL, NULL) };
    done == 0
}

/// Stops this thread, for its tracer to go on with.
pub fn stop_this_thread() {
    // SAFETY: `raise` takes a number only, and sends to the calling thread.
    unsafe { libc::raise(libc::SIGSTOP) };
}

fn step(thread: Pid) {
    let thread = thread.as_raw_nonzero().get();
    // SAFETY: no memory of this process is passed; `thread` is a stopped thread of a child that asked to be traced.
    let done = unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, thread, NULL, NULL) };
    assert_eq!(done, 0, "PTRACE_SINGLESTEP: {}", std::io::Error::last_os_error());
}

/// All that a call on a slot may change.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Shared {
    cells: [u64; 8],
    sums: [Option<PartSum>; 2],
    chunk: Option<ChunkWord>,
}

fn shared(table: &TableMap, slot: SlotId) -> Shared {
    let record = table.record(slot).unwrap();
    Shared {
        cells: std::array::from_fn(|cell| record.0[cell].load(Ordering::Acquire)),
        sums: [0, 1].map(|part| table.part_sum(slot, PartId(part))),
        chunk: table.layout().geometry.chunk_of(slot).and_then(|chunk| table.chunk(chunk)),
    }
}

impl Kills {
    /// One life, killed in a call of a kind right after its n-th change of the table (or after the call, where it makes
    /// fewer). `None` where `ptrace` is not allowed.
    pub fn stepped(&mut self, call: Call, changes: u64) -> Option<(Verdict, Stepped)> {
        self.page.reset();
        let after = 1 + self.random.below(150);
        self.page.ask_to_stop(call, after);
        let mut life = self.start();
        life.wait_until(|| self.page.thread() != 0);
        if self.page.thread() == NOT_TRACED {
            return None;
        }
        let thread = Pid::from_raw(self.page.thread() as i32).unwrap();
        life.traced = Some(thread);
        assert_eq!(wait_for_thread(thread), Ok(Some(libc::SIGSTOP)), "a life did not stop in a {call:?}");
        let stepped = self.step_through(thread, call, changes);
        Some((self.end(life), stepped))
    }

    fn step_through(&self, thread: Pid, call: Call, changes: u64) -> Stepped {
        let (table, slot, finished) = (self.table(), self.page.slot(), self.page.finished(call));
        let (mut last, mut done) = (shared(&table, slot), Stepped::default());
        while done.changes < changes && self.page.finished(call) == finished {
            step(thread);
            assert_eq!(wait_for_thread(thread), Ok(Some(libc::SIGTRAP)));
            done.instructions += 1;
            assert!(done.instructions < STEPS_MOST, "a {call:?} never ended");
            let now = shared(&table, slot);
            done.changes += u64::from(now != last);
            last = now;
        }
        Stepped { finished: self.page.finished(call) > finished, ..done }
    }

    fn table(&self) -> TableMap {
        let layout = Layout::new(Geometry::new(6 << 20, Some(2 << 20)).unwrap());
        let file = File::open(self.segment()).unwrap();
        TableMap::new(Mapping::new(&file, 0, layout.table_bytes(), Access::Read).unwrap(), layout)
    }
}
