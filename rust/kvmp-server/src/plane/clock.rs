//! The store's clock: the boot-time clock in ticks since the file was made. It never goes back, also not from one server
//! to the next, and the time of day plays no part in it.

use kvmp_core::clock::Ticks;
use kvmp_core::ids::ChunkId;
use kvmp_core::segment::{ChunkWord, TableMap};

use crate::segment::boot_clock_ns;

/// Uses later than this after the file was made are not believed: no machine runs for so long (4.2 years), and no check
/// covers a record's time. The clock so has half of what `touched` holds before it, whatever bit has flipped.
const BELIEVED: Ticks = Ticks(1 << 31);

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
    newest_believed(records.filter(|record| record.whole).map(|record| record.touched))
}

fn newest_believed(stamps: impl Iterator<Item = u32>) -> Ticks {
    stamps.map(|touched| Ticks(u64::from(touched))).filter(|at| *at < BELIEVED).max().unwrap_or_default()
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

    #[test]
    fn a_flipped_bit_in_a_records_time_does_not_use_the_clock_up() {
        let (used, half) = (1_000_000, u64::from(u32::MAX / 2));
        for bit in 0..32 {
            let newest = newest_believed([used, used - 7, used ^ 1 << bit].into_iter());
            assert!(newest >= Ticks(u64::from(used)) && newest.0 <= half, "bit {bit}: {newest:?}");
            // For all the years to come, what is used later has a later time.
            let clock = SegmentClock::new(2 * S, || newest, S);
            let in_years = |years: u64| clock.at(S + years * 365 * 86_400 * S).touched();
            assert!((0..4).all(|years| in_years(years) < in_years(years + 1)), "bit {bit}");
        }
        assert_eq!(newest_believed(std::iter::empty()), Ticks(0));
    }
}
