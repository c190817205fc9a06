//! The allotter of a ring's scratch area: first fit over a sorted list of free ranges, neighbours joined.

use kvmp_core::ring::SCRATCH_BYTES;

/// Ranges begin and end on cache lines, so that requests under way share none.
const ALIGN: u32 = 64;

/// A range of the scratch area; bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Range {
    pub offset: u32,
    /// As asked for; what is set aside is this rounded up to 64.
    pub len: u32,
}

impl Range {
    fn end(self) -> u32 {
        self.offset + self.len
    }
}

/// Which ranges are free. Invariant: sorted, apart from each other by at least one byte, none empty.
#[derive(Debug)]
pub(crate) struct Scratch {
    free: Vec<Range>,
}

impl Scratch {
    pub fn new() -> Self {
        Self { free: vec![Range { offset: 0, len: SCRATCH_BYTES as u32 }] }
    }

    /// A range of at least `len` bytes; an empty one costs nothing.
    pub fn take(&mut self, len: usize) -> Option<Range> {
        let len = u32::try_from(len).ok()?;
        let room = len.checked_next_multiple_of(ALIGN)?;
        if room == 0 {
            return Some(Range::default());
        }
        let at = self.free.iter().position(|free| free.len >= room)?;
        let offset = self.free[at].offset;
        if self.free[at].len == room {
            self.free.remove(at);
        } else {
            self.free[at] = Range { offset: offset + room, len: self.free[at].len - room };
        }
        Some(Range { offset, len })
    }

    /// Gives back what [`Self::take`] gave.
    pub fn give(&mut self, range: Range) {
        let mut range = Range { len: range.len.next_multiple_of(ALIGN), ..range };
        if range.len == 0 {
            return;
        }
        let mut at = self.free.partition_point(|free| free.offset < range.offset);
        if at > 0 && self.free[at - 1].end() == range.offset {
            at -= 1;
            let before = self.free.remove(at);
            range = Range { offset: before.offset, len: before.len + range.len };
        }
        if self.free.get(at).is_some_and(|after| range.end() == after.offset) {
            range.len += self.free.remove(at).len;
        }
        self.free.insert(at, range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Scratch {
        fn validate(&self, held: &[Range]) {
            let mut all: Vec<(Range, bool)> = self.free.iter().map(|&r| (r, true)).collect();
            let rounded = |r: &Range| Range { len: r.len.next_multiple_of(ALIGN), ..*r };
            all.extend(held.iter().map(rounded).filter(|r| r.len > 0).map(|r| (r, false)));
            all.sort_by_key(|(r, _)| r.offset);
            let mut at = 0;
            for (range, _) in &all {
                assert_eq!(range.offset, at, "the ranges tile the area");
                at = range.end();
            }
            assert_eq!(u64::from(at), SCRATCH_BYTES);
            assert!(all.windows(2).all(|two| !(two[0].1 && two[1].1)), "free neighbours are joined");
        }
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_come_back(
            steps in proptest::collection::vec((any::<bool>(), 0usize..(3 << 20), any::<prop::sample::Index>()), 1..200)
        ) {
            let mut scratch = Scratch::new();
            let mut held = Vec::new();
            for (take, len, which) in steps {
                if take {
                    held.extend(scratch.take(len));
                } else if !held.is_empty() {
                    scratch.give(held.swap_remove(which.index(held.len())));
                }
                scratch.validate(&held);
            }
            held.drain(..).for_each(|range| scratch.give(range));
            prop_assert_eq!(scratch.take(SCRATCH_BYTES as usize), Some(Range { offset: 0, len: SCRATCH_BYTES as u32 }));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut scratch = Scratch::new();
        assert_eq!(scratch.take(SCRATCH_BYTES as usize + 1), None);
        assert_eq!(scratch.take(usize::MAX), None);
        assert!(scratch.take(SCRATCH_BYTES as usize).is_some());
        assert_eq!(scratch.take(1), None);
        assert_eq!(scratch.take(0), Some(Range::default()));
    }
}
