//! A page that outlives the process that notes in it what it is doing.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use kvmp_core::ids::SlotId;
use kvmp_core::segment::{Access, Mapping};

use super::stepping::stop_this_thread;

const BYTES: u64 = 4096;
const CALL: u64 = 0;
const WORK: u64 = 64;
const STAGE: u64 = 128;
const COUNTS: u64 = 192;
const SLOT: u64 = 256;
const THREAD: u64 = 320;
const STOP_IN: u64 = 384;
const STOP_AFTER: u64 = 392;
const HOLD_IN: u64 = 448;
const HOLD_AFTER: u64 = 456;
const HOLD_AT: u64 = 464;
const HELD: u64 = 472;

/// In `HELD`: the call under way is the one to hold in; it does.
const TO_HOLD: u64 = 1;
const IS_HELD: u64 = 2;

/// Where a life is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u64)]
pub enum Stage {
    Born = 0,
    Recovering = 1,
    Working = 2,
}

macro_rules! steps {
    ($(#[$doc:meta])* $name:ident { $($step:ident),* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u64)]
        pub enum $name { $($step),* }

        impl $name {
            pub const ALL: &[Self] = &[$(Self::$step),*];
        }
    };
}

steps! {
    /// The change of the shared table that is under way.
    Call { None, Grant, Commit, Evict, Touch, SetChunk }
}

steps! {
    /// What the change is part of.
    Work { Between, Recover, Lookup, Reserve, WriteBytes, CommitPart, Abort, Evict, Clear, Distrust, Release }
}

/// The mapped page.
#[derive(Clone, Debug)]
pub struct Page(Mapping);

impl Page {
    pub fn open(dir: &Path) -> Self {
        let path = dir.join("page");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(BYTES).unwrap();
        Self(Mapping::new(&file, 0, BYTES, Access::ReadWrite).unwrap())
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        self.0.u64_at(at)
    }

    /// Notes a step around what is done in it. A kill leaves the stores that the program had come to, in their order; so
    /// the note is exact to the instruction, if only the compiler keeps to that order too.
    fn during<R>(&self, at: u64, step: u64, deed: impl FnOnce() -> R) -> R {
        let before = self.word(at).swap(step, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        let result = deed();
        compiler_fence(Ordering::SeqCst);
        self.word(at).store(before, Ordering::Relaxed);
        result
    }

    pub fn call<R>(&self, call: Call, slot: SlotId, deed: impl FnOnce() -> R) -> R {
        self.word(SLOT).store(u64::from(slot.0), Ordering::Relaxed);
        if self.is_asked_to_stop(call) {
            stop_this_thread();
        }
        self.note_hold(call);
        let result = self.during(CALL, call as u64, deed);
        self.word(COUNTS + 8 * call as u64).fetch_add(1, Ordering::Relaxed);
        result
    }

    pub fn work<R>(&self, work: Work, deed: impl FnOnce() -> R) -> R {
        self.during(WORK, work as u64, deed)
    }

    pub fn set_stage(&self, stage: Stage) {
        self.word(STAGE).store(stage as u64, Ordering::Release);
    }

    pub fn has_come_to(&self, stage: Stage) -> bool {
        self.word(STAGE).load(Ordering::Acquire) >= stage as u64
    }

    /// The step that the last life ended in.
    pub fn last(&self) -> (Work, Call) {
        let step = |at| self.word(at).load(Ordering::Acquire) as usize;
        (Work::ALL[step(WORK)], Call::ALL[step(CALL)])
    }

    /// Calls of a kind that all lives finished.
    pub fn finished(&self, call: Call) -> u64 {
        self.word(COUNTS + 8 * call as u64).load(Ordering::Relaxed)
    }

    /// The slot of the last call.
    pub fn slot(&self) -> SlotId {
        SlotId(self.word(SLOT).load(Ordering::Acquire) as u32)
    }

    /// Has the next life stop itself before its `after`th call of a kind at work.
    pub fn ask_to_stop(&self, call: Call, after: u64) {
        self.word(STOP_AFTER).store(after, Ordering::Release);
        self.word(STOP_IN).store(call as u64, Ordering::Release);
    }

    /// Whether this life is to stop itself at all.
    pub fn will_stop(&self) -> bool {
        self.word(STOP_IN).load(Ordering::Acquire) != 0
    }

    fn is_asked_to_stop(&self, call: Call) -> bool {
        self.word(STOP_IN).load(Ordering::Relaxed) == call as u64
            && self.has_come_to(Stage::Working)
            && self.word(STOP_AFTER).fetch_sub(1, Ordering::Relaxed) == 1
    }

    /// Has the next life hold in its `after`th call of a kind at work, once it has made so many of its stores.
    pub fn ask_to_hold(&self, call: Call, after: u64, stores: u64) {
        self.word(HOLD_AFTER).store(after, Ordering::Release);
        self.word(HOLD_AT).store(stores, Ordering::Release);
        self.word(HOLD_IN).store(call as u64, Ordering::Release);
    }

    /// Whether it does.
    pub fn is_held(&self) -> bool {
        self.word(HELD).load(Ordering::Acquire) == IS_HELD
    }

    /// From here on until the call's stores are counted.
    fn note_hold(&self, call: Call) {
        let asked = self.word(HOLD_IN).load(Ordering::Relaxed) == call as u64 && self.has_come_to(Stage::Working);
        if asked && self.word(HOLD_AFTER).fetch_sub(1, Ordering::Relaxed) == 1 {
            self.word(HELD).store(TO_HOLD, Ordering::Release);
        }
    }

    /// After so many stores of a call: never returns where it is to hold there.
    pub fn stored(&self, stores: usize) {
        if self.word(HELD).load(Ordering::Relaxed) == TO_HOLD
            && self.word(HOLD_AT).load(Ordering::Relaxed) == stores as u64
        {
            self.word(HELD).store(IS_HELD, Ordering::Release);
            loop {
                std::thread::park();
            }
        }
    }

    /// Says which thread works; 0 is none yet.
    pub fn set_thread(&self, id: u64) {
        self.word(THREAD).store(id, Ordering::Release);
    }

    pub fn thread(&self) -> u64 {
        self.word(THREAD).load(Ordering::Acquire)
    }

    /// Ready for the next life.
    pub fn reset(&self) {
        [CALL, WORK, STOP_IN, THREAD, HOLD_IN, HELD]
            .into_iter()
            .for_each(|at| self.word(at).store(0, Ordering::Release));
        self.set_stage(Stage::Born);
    }
}
