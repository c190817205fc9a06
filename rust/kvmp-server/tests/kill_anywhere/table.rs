//! The segment's slot table with its calls noted in the page; and the same with the order of a record's changes wrong.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::segment::{ChunkWord, RecordCells, TableMap};
use kvmp_core::slot::{BlockIdentity, PartSum, SlotState, SlotWord};
use kvmp_core::store::{ChunkState, SlotTable};

use super::page::{Call, Page};
use crate::segment::SegmentTable;

/// In which order a record and its bytes change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// As `RecordCells` has it, by its own code.
    Right,
    /// The same order, store by store with a pause between them.
    RightSlowly,
    /// Grant: the fields, then word = Writing.
    FieldsBeforeWord,
    /// Commit: word = Ready, then the check.
    ReadyBeforeCheck,
    /// Commit: check and word, then the sums of the parts.
    ReadyBeforeSums,
    /// A writer commits, then stores the bytes.
    CommitBeforeBytes,
    /// The bytes of a new block are stored while the word is still that of the old one.
    BytesUnderOldWord,
}

impl Order {
    const ALL: [Self; 7] = [
        Self::Right,
        Self::RightSlowly,
        Self::FieldsBeforeWord,
        Self::ReadyBeforeCheck,
        Self::ReadyBeforeSums,
        Self::CommitBeforeBytes,
        Self::BytesUnderOldWord,
    ];

    /// The order with this name.
    pub fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|order| format!("{order:?}") == name).expect("an order")
    }
}

/// See the module.
pub struct NotedTable {
    map: TableMap,
    real: SegmentTable,
    page: Page,
    order: Order,
    /// What `BytesUnderOldWord` keeps from the segment: words, and what was granted.
    hidden: BTreeMap<SlotId, (SlotWord, Option<BlockIdentity>)>,
}

impl NotedTable {
    pub fn new(map: TableMap, page: Page, order: Order) -> Self {
        Self { real: SegmentTable::new(map.clone()), map, page, order, hidden: BTreeMap::new() }
    }
}

impl SlotTable for NotedTable {
    fn grant(&mut self, slot: SlotId, identity: &BlockIdentity) -> SlotWord {
        let Self { map, real, page, order, hidden } = self;
        page.call(Call::Grant, slot, || match order {
            Order::FieldsBeforeWord => {
                grant_slowly(page, &map.record(slot).unwrap(), identity, &[1, 2, 3, 4, 5, 6, 7, 0])
            }
            Order::RightSlowly => grant_slowly(page, &map.record(slot).unwrap(), identity, &[0, 1, 2, 3, 4, 5, 6, 7]),
            Order::BytesUnderOldWord => {
                let word = hidden.get(&slot).map_or(real.word(slot), |hidden| hidden.0);
                let granted = SlotWord::new(word.generation() + 1, SlotState::Writing);
                hidden.insert(slot, (granted, Some(*identity)));
                granted
            }
            _ => real.grant(slot, identity),
        })
    }

    fn commit(&mut self, slot: SlotId, sums: &[PartSum]) -> SlotWord {
        let Self { map, real, page, order, hidden } = self;
        page.call(Call::Commit, slot, || match order {
            Order::ReadyBeforeCheck => commit_slowly((map, page), slot, sums, &[0, 7]),
            Order::RightSlowly => commit_slowly((map, page), slot, sums, &[7, 0]),
            Order::ReadyBeforeSums => {
                let word = commit_slowly((map, page), slot, &[], &[7, 0]);
                set_sums(map, slot, sums);
                word
            }
            _ => {
                if let Some((_, Some(identity))) = hidden.remove(&slot) {
                    real.grant(slot, &identity);
                }
                real.commit(slot, sums)
            }
        })
    }

    fn evict(&mut self, slot: SlotId) {
        let Self { real, page, order, hidden, .. } = self;
        page.call(Call::Evict, slot, || match order {
            Order::BytesUnderOldWord => {
                let word = hidden.get(&slot).map_or(real.word(slot), |hidden| hidden.0);
                hidden.insert(slot, (word.with_state(SlotState::Free), None));
            }
            _ => real.evict(slot),
        });
    }

    fn touch(&mut self, slot: SlotId, touched: u32) {
        let Self { real, page, .. } = self;
        page.call(Call::Touch, slot, || real.touch(slot, touched));
    }

    fn word(&self, slot: SlotId) -> SlotWord {
        self.hidden.get(&slot).map_or(self.real.word(slot), |hidden| hidden.0)
    }

    fn set_chunk(&mut self, chunk: ChunkId, state: ChunkState) {
        let Self { real, page, .. } = self;
        page.call(Call::SetChunk, SlotId::NONE, || real.set_chunk(chunk, state));
    }
}

/// What the real code makes of a copy of the record, stored cell by cell in an order of the caller's.
fn slowly(
    page: &Page,
    record: &RecordCells<'_>,
    cells: &[usize],
    change: impl FnOnce(&RecordCells<'_>) -> SlotWord,
) -> SlotWord {
    let copy: [AtomicU64; 8] = std::array::from_fn(|cell| AtomicU64::new(record.0[cell].load(Ordering::Relaxed)));
    let word = change(&RecordCells(&copy));
    for (&cell, stores) in cells.iter().zip(1..) {
        record.0[cell].store(copy[cell].load(Ordering::Relaxed), Ordering::Release);
        fence(Ordering::Release);
        page.stored(stores);
        pause();
    }
    word
}

fn grant_slowly(page: &Page, record: &RecordCells<'_>, identity: &BlockIdentity, cells: &[usize; 8]) -> SlotWord {
    slowly(page, record, cells, |record| record.grant(identity))
}

fn commit_slowly((map, page): (&TableMap, &Page), slot: SlotId, sums: &[PartSum], cells: &[usize; 2]) -> SlotWord {
    set_sums(map, slot, sums);
    slowly(page, &map.record(slot).unwrap(), cells, |record| record.commit())
}

fn set_sums(map: &TableMap, slot: SlotId, sums: &[PartSum]) {
    let chunk = map.layout().geometry.chunk_of(slot).unwrap();
    let Some(ChunkWord::Assigned(pages) | ChunkWord::Draining(pages)) = map.chunk(chunk) else { return };
    map.set_part_sums(slot, pages, sums);
    fence(Ordering::Release);
}

/// A fraction of a microsecond, so that a kill finds the steps apart: two stores in a row take a nanosecond.
fn pause() {
    (0..100).for_each(|_| std::hint::spin_loop());
}
