//! Commit and abort: a worker says that its part of some slots is written, or will not be.

use std::sync::Arc;

use kvmp_core::slot::PartSum;
use kvmp_core::wire::{Op, PartIn, Submission};
use zerocopy::IntoBytes;

use crate::error::input;
use crate::request::Ask;
use crate::session::Session;
use crate::stats::expect_ok;
use crate::{Bound, ClientError};

/// One commit's or abort's slots, all of one lease and part.
pub(crate) struct PartList<'a> {
    pub lease: u64,
    pub part: u16,
    pub slots: &'a [u32],
    pub words: &'a [u64],
    pub sums: Option<&'a [PartSum]>,
}

impl PartList<'_> {
    fn check(&self) -> Result<(), ClientError> {
        let n = self.slots.len();
        if self.words.len() != n {
            return Err(input("words", format!("{} words for {n} slots", self.words.len())));
        }
        match self.sums {
            Some(sums) if sums.len() != n => Err(input("sums", format!("{} sums for {n} slots", sums.len()))),
            _ => Ok(()),
        }
    }

    fn part_in(&self, at: usize) -> PartIn {
        let sum = self.sums.map_or(PartSum::default(), |sums| sums[at]);
        PartIn { slot: self.slots[at], reserved: 0, word: self.words[at], sum }
    }
}

/// Sends the list in as many requests as it takes, all within the one bound; how many slots were taken.
pub(crate) fn close_parts(
    session: &Arc<Session>,
    keys_max: u32,
    op: Op,
    list: &PartList<'_>,
    bound: &Bound<'_>,
) -> Result<u32, ClientError> {
    list.check()?;
    let mut taken = 0;
    for from in (0..list.slots.len()).step_by(keys_max.max(1) as usize) {
        let to = list.slots.len().min(from + keys_max.max(1) as usize);
        let parts: Vec<PartIn> = (from..to).map(|at| list.part_in(at)).collect();
        let entry = Submission { part: list.part, lease: list.lease, count: parts.len() as u32, ..Default::default() };
        let mut ticket = session.submit(&Ask { op, entry, input: &[parts.as_bytes()], out_bytes: 0 })?;
        let reply = ticket.wait(bound)?;
        expect_ok(op, &reply.completion)?;
        taken += reply.completion.count;
    }
    Ok(taken)
}
