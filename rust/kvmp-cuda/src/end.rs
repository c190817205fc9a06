//! The end of a copy, as the GPU tells it, and when else the driver is asked.
//!
//! A call of the driver may wait for its lock: for tens of milliseconds while memory is registered. So who looks after a
//! copy looks here first, which never waits.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::Bell;

/// The driver is asked how copies stand no sooner than this after it was last asked.
const PAUSE: Duration = Duration::from_millis(10);

/// Of one copy: whether the GPU has told of its end.
#[derive(Debug, Default)]
pub(crate) struct End {
    told: OnceLock<()>,
    bell: Option<Arc<Bell>>,
}

impl End {
    /// Of a copy whose end rings `bell`.
    pub fn new(bell: Option<Arc<Bell>>) -> Self {
        Self { told: OnceLock::new(), bell }
    }

    /// Whether its last byte has moved and the GPU has said so. It never does of a copy that failed.
    pub fn is_told(&self) -> bool {
        self.told.get().is_some()
    }

    /// Called by the GPU's driver, behind the copy.
    pub fn tell(&self) {
        let _ = self.told.set(());
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }
}

/// When the driver was asked how the copies of one GPU stand. Ends are told; only a failure, which ends every copy, is not.
#[derive(Debug, Default)]
pub(crate) struct Asked(Mutex<Answers>);

#[derive(Debug, Default)]
struct Answers {
    last: Option<Instant>,
    has_failed: bool,
}

impl Asked {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether to ask at `now`, which is noted: always once a copy has failed, else now and then, for all copies together.
    pub fn is_due(&self, now: Instant) -> bool {
        let mut answers = self.lock();
        let is_due = answers.has_failed || answers.last.is_none_or(|last| now.duration_since(last) >= PAUSE);
        if is_due {
            answers.last = Some(now);
        }
        is_due
    }

    /// Notes that the driver told of a failure.
    pub fn failed(&self) {
        self.lock().has_failed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_once_and_rings() {
        let bell = Arc::new(Bell::default());
        let end = End::new(Some(Arc::clone(&bell)));
        assert!(!end.is_told() && !bell.wait(Some(Duration::ZERO)));
        end.tell();
        assert!(end.is_told() && bell.wait(Some(Duration::ZERO)));
    }

    #[test]
    fn the_driver_is_asked_now_and_then_for_all_copies_and_about_each_after_a_failure() {
        let (asked, start) = (Asked::default(), Instant::now());
        assert!(asked.is_due(start));
        assert!(!asked.is_due(start));
        assert!(!asked.is_due(start + PAUSE - Duration::from_millis(1)));
        assert!(asked.is_due(start + PAUSE));
        asked.failed();
        assert!(asked.is_due(start + PAUSE) && asked.is_due(start + PAUSE));
    }
}
