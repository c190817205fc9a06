//! Sums of parts: xxh3-64 over the bytes of a part as they lie in the arena.
//!
//! A writer makes them when its copy has ended and sends them with the commit, with the parts' lengths (which namespace
//! and group a slot is of stands in its record); a reader makes them anew and compares, before it checks the words.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmp_core::ids::{PartId, SlotId};
use kvmp_core::segment::TableMap;
use kvmp_core::slot::PartSum;

use xxhash_rust::xxh3::Xxh3;

use crate::error::input;
use crate::lease::{self, record_of};
use crate::slots::PartsAt;
use crate::{ClientError, Namespace};

/// Bytes taken out of the arena at a time: others may write there, so a sum is made of a private copy.
const PIECE: usize = 64 << 10;

/// What a reader's check of a part comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PartCheck {
    /// The slot is the one leased, and its bytes are those that were committed.
    Intact = 0,
    /// The slot is another grant's by now.
    Gone = 1,
    /// The slot is the one leased; its bytes are not those that were committed, or they were committed without a sum.
    Damaged = 2,
}

/// The sum of each part.
pub(crate) fn xxh3_of(at: &PartsAt) -> Vec<u64> {
    let mut piece = vec![0; PIECE.min(usize::try_from(at.bytes).unwrap_or(PIECE))];
    at.offsets.iter().map(|&offset| xxh3_of_part(at, offset, &mut piece)).collect()
}

fn xxh3_of_part(at: &PartsAt, offset: u64, piece: &mut [u8]) -> u64 {
    let mut sum = Xxh3::new();
    let (mut from, end) = (offset, offset + at.bytes);
    while from < end {
        let n = usize::try_from(end - from).unwrap_or(PIECE).min(piece.len());
        at.arena.read(from, &mut piece[..n]);
        sum.update(&piece[..n]);
        from += n as u64;
    }
    sum.digest()
}

/// Compares each part with the sum that its commit brought. A part without one counts as damaged.
pub(crate) fn check(table: &TableMap, at: &PartsAt, part: u16, slots: &[u32], words: &[u64]) -> Vec<PartCheck> {
    let expected: Vec<Option<PartSum>> = slots.iter().map(|&slot| table.part_sum(SlotId(slot), PartId(part))).collect();
    let found = xxh3_of(at);
    let same = |sum: &PartSum, xxh3| {
        sum.flags & PartSum::HAS_SUM != 0 && u64::from(sum.length) == at.bytes && sum.xxh3 == xxh3
    };
    // The words come last: they say whether what was read above was the leased block's.
    let words = lease::check(table, slots, words);
    let check = |((expected, found), still): ((Option<PartSum>, u64), bool)| match (still, expected) {
        (false, _) => PartCheck::Gone,
        (true, Some(sum)) if same(&sum, found) => PartCheck::Intact,
        (true, _) => PartCheck::Damaged,
    };
    expected.into_iter().zip(found).zip(words).map(check).collect()
}

/// The namespaces that a client opened or joined, by number.
#[derive(Debug, Default)]
pub(crate) struct OpenedNamespaces(Mutex<HashMap<u16, Namespace>>);

impl OpenedNamespaces {
    fn lock(&self) -> MutexGuard<'_, HashMap<u16, Namespace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, namespace: &Namespace) {
        self.lock().insert(namespace.id(), namespace.clone());
    }

    /// A sum a slot. The commit's slot words show the server whether a record was another grant's meanwhile.
    pub fn part_sums(
        &self,
        table: &TableMap,
        part: u16,
        slots: &[u32],
        xxh3: &[u64],
    ) -> Result<Vec<PartSum>, ClientError> {
        if xxh3.len() != slots.len() {
            return Err(input("sums", format!("{} sums for {} slots", xxh3.len(), slots.len())));
        }
        let opened = self.lock();
        let sum = |(&slot, &xxh3)| {
            let length = part_bytes(&opened, table, part, slot).ok_or_else(|| unknown(slot, part))?;
            Ok(PartSum { xxh3, length, flags: PartSum::HAS_SUM })
        };
        slots.iter().zip(xxh3).map(sum).collect()
    }
}

fn unknown(slot: u32, part: u16) -> ClientError {
    input("slots", format!("slot {slot} is of no namespace joined here that has a part {part}; join it first"))
}

fn part_bytes(opened: &HashMap<u16, Namespace>, table: &TableMap, part: u16, slot: u32) -> Option<u32> {
    let identity = record_of(table, SlotId(slot))?.read().identity;
    let layout = opened.get(&identity.namespace.0)?.slot_layout(identity.group.0).ok()?;
    u32::try_from(layout.part(PartId(part))?.bytes).ok()
}
