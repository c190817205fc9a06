//! The store's clock: the boot-time clock in ticks since the file was made. It never goes back, also not from one server
//! to the next, and the time of day plays no part in it.

use kvmp_core::clock::Ticks;
use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{ChunkWord, TableMap};

use crate::segment::boot_clock_ns;

/// Ticks from a boot-time clock in nanoseconds.
#[derive(Debug)]
pub(crate) struct SegmentClock {
    began: Ticks,
    boot_ns: u64,
}

impl SegmentClock {
    /// Of the file that a server starts on now.
    pub fn of(table: &TableMap) -> Self {
        Self::new(table.header().map_or(0, |header| header.made_ns), || newest_use(table), boot_clock_ns())
    }

    fn new(made_ns: u64, newest: impl FnOnce() -> Ticks, boot_ns: u64) -> Self {
        // A boot-time clock that was ahead (in another time namespace) when the file was made would stand still here until
        // it is there again, and with it every lease: go on from what was seen last.
        let began = boot_ns.checked_sub(made_ns).map_or_else(newest, ticks);
        Self { began, boot_ns }
    }

    /// The time when the boot-time clock says `boot_ns`.
    pub fn at(&self, boot_ns: u64) -> Ticks {
        self.began.after(ticks(boot_ns.saturating_sub(self.boot_ns)))
    }
}

/// Last use of any block in the file.
fn newest_use(table: &TableMap) -> Ticks {
    let geometry = table.layout().geometry;
    let slots = (0..geometry.chunks).map(ChunkId).flat_map(|chunk| {
        let slots = match table.chunk(chunk) {
            Some(ChunkWord::Assigned(pages) | ChunkWord::Draining(pages)) => geometry.slots_per_chunk(pages),
            _ => 0,
        };
        (0..slots).map(move |index| geometry.slot(chunk, index))
    });
    let records = slots.filter_map(|slot| Some(table.record(slot)?.read()));
    records.filter(|record| record.whole).map(|record| Ticks(u64::from(record.touched))).max().unwrap_or_default()
}

fn ticks(ns: u64) -> Ticks {
    Ticks((u128::from(ns) * u128::from(Ticks::PER_SECOND) / 1_000_000_000) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn it_counts_from_when_the_file_was_made() {
        let clock = SegmentClock::new(100 * S, || unreachable!(), 160 * S);
        assert_eq!((clock.at(160 * S), clock.at(161 * S + S / 16)), (Ticks(60 * 16), Ticks(61 * 16 + 1)));
    }

    #[test]
    fn a_boot_clock_that_was_set_back_does_not_stop_it() {
        let clock = SegmentClock::new(1_000_000 * S, || Ticks(77), 10 * S);
        assert_eq!((clock.at(10 * S), clock.at(11 * S)), (Ticks(77), Ticks(77 + 16)));
        assert_eq!(clock.at(9 * S), Ticks(77));
    }
}
