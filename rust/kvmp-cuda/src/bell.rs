//! Wakes the one thread that waits for whatever comes next: a job, or the end of a copy.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Rung once or often, it wakes one wait.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// Ends the wait under way, or else the next one.
    pub fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }

    /// Waits until rung, at most `limit` (`None`: for ever); whether it was.
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rung = match limit {
            Some(limit) => {
                self.changed.wait_timeout_while(rung, limit, |rung| !*rung).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait_while(rung, |rung| !*rung).unwrap_or_else(PoisonError::into_inner),
        };
        std::mem::replace(&mut rung, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_not_lost_and_counts_once() {
        let bell = Bell::default();
        bell.ring();
        bell.ring();
        assert!(bell.wait(None));
        assert!(!bell.wait(Some(Duration::ZERO)));
    }

    #[test]
    fn a_ring_ends_the_wait() {
        let bell = Bell::default();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| bell.wait(None));
            bell.ring();
            assert!(waiter.join().unwrap());
        });
    }
}
