//! The one clock of store, policies and records; whoever calls says what time it is.

/// Boot-time clock in 1/16 s since the segment's file was made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Ticks(pub u64);

impl Ticks {
    /// Ticks in a second.
    pub const PER_SECOND: u64 = 16;

    /// Ticks of a duration in milliseconds, rounded up so that a TTL is never cut short.
    #[must_use]
    pub fn from_millis(millis: u64) -> Self {
        Self((millis * Self::PER_SECOND).div_ceil(1000))
    }

    /// This time and `span` later.
    #[must_use]
    pub fn after(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// As a record's `touched` field holds it; full after 8.5 years.
    #[must_use]
    pub fn touched(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }
}
