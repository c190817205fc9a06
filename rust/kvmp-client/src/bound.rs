//! How long a call may wait, and who may end the wait before.

use std::time::{Duration, Instant};

/// The bound of one call, counted from where it was made.
#[derive(Clone, Copy)]
pub struct Bound<'a> {
    from: Instant,
    limit: Duration,
    interrupted: Option<&'a dyn Fn() -> bool>,
}

impl Bound<'static> {
    /// A bound of `limit` from now on.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self { from: Instant::now(), limit, interrupted: None }
    }

    /// A bound of `ms` milliseconds from now on.
    #[must_use]
    pub fn ms(ms: u64) -> Self {
        Self::new(Duration::from_millis(ms))
    }
}

impl<'a> Bound<'a> {
    /// The same bound; the wait also ends, with [`crate::ClientError::Interrupted`], when `interrupted` says so. It is
    /// asked between sleeps of at most 10 ms.
    #[must_use]
    pub fn or_until<'b>(self, interrupted: &'b dyn Fn() -> bool) -> Bound<'b> {
        Bound { from: self.from, limit: self.limit, interrupted: Some(interrupted) }
    }

    /// What is left of it.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.from.elapsed())
    }

    /// Its whole length in milliseconds.
    #[must_use]
    pub fn limit_ms(&self) -> u64 {
        u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.is_some_and(|asked| asked())
    }
}
