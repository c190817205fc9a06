//! Sleep and wake without a lost wake-up.
//!
//! Publisher: publish, `fence(SeqCst)`, load parked. Sleeper: set parked, `fence(SeqCst)`, look again.
//! Whichever fence comes second in their single total order, its side sees the other's store.

use crate::sync::{AtomicU32, Ordering, fence};

/// The parked word of one sleeper.
#[derive(Clone, Copy, Debug)]
pub struct Parking<'a>(pub &'a AtomicU32);

impl Parking<'_> {
    /// Sleeper: says "I am about to sleep"; after this, look once more before sleeping.
    pub fn announce(self) {
        self.0.store(1, Ordering::Relaxed);
        // (D) Pairs with the fence in `must_ring`.
        fence(Ordering::SeqCst);
    }

    /// Sleeper: awake again.
    pub fn withdraw(self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Publisher, after it published: whether the sleeper must be woken.
    #[must_use]
    pub fn must_ring(self) -> bool {
        // (D)
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) != 0
    }
}
