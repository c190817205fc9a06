//! Leases: what a lookup or a reserve gave, ended when dropped; and the slot-word check.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmp_core::ids::SlotId;
use kvmp_core::segment::{ChunkWord, RecordCells, TableMap};
use kvmp_core::sync::{Ordering, fence};
use kvmp_core::wire::Op;

use crate::session::Session;

/// The blocks of one group that a hit has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupRun {
    /// Index of the first block of the run.
    pub first_block: u32,
    /// Slot numbers, block after block.
    pub slots: Vec<u32>,
    /// Their slot words.
    pub words: Vec<u64>,
}

/// A hit: slots and words to load from, and a promise that they stay as long as nothing goes wrong.
///
/// The promise is of hits, not of safety: after a copy the words are checked ([`crate::Client::check`]).
pub struct ReadLease {
    session: Arc<Session>,
    leases: Vec<u64>,
    pub(crate) groups: Vec<GroupRun>,
    pub(crate) tokens: u64,
    pinned: bool,
    made: Instant,
}

impl ReadLease {
    pub(crate) fn empty(session: Arc<Session>, groups: usize) -> Self {
        let groups = vec![GroupRun::default(); groups];
        Self { session, leases: Vec::new(), groups, tokens: 0, pinned: true, made: Instant::now() }
    }

    pub(crate) fn add(&mut self, lease: u64, tokens: u32, pinned: bool) {
        if lease != 0 {
            self.leases.push(lease);
        }
        self.tokens += u64::from(tokens);
        self.pinned &= pinned;
    }

    /// Tokens hit.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The run of a group, if there is such a group.
    #[must_use]
    pub fn group(&self, group: u16) -> Option<&GroupRun> {
        self.groups.get(usize::from(group))
    }

    /// Whether the blocks are pinned; over its cap an engine gets hits without.
    #[must_use]
    pub fn pinned(&self) -> bool {
        self.pinned && !self.leases.is_empty()
    }

    /// Life of the server that granted it.
    #[must_use]
    pub fn server_epoch(&self) -> u64 {
        self.session.epoch
    }

    /// Identity of the segment that the slots are in.
    #[must_use]
    pub fn segment_id(&self) -> &str {
        &self.session.segment_id
    }

    /// Time since the reply was taken; the server drops a pin after 60 s.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.made.elapsed()
    }

    /// Ends the lease without waiting; again is harmless.
    pub fn release(&mut self) {
        for lease in self.leases.drain(..) {
            self.session.owe(Op::Release, lease);
        }
    }
}

impl Drop for ReadLease {
    fn drop(&mut self) {
        self.release();
    }
}

/// Slots to write, one answer a hash; cancelled when dropped unless it was handed over to workers.
pub struct WriteLease {
    session: Arc<Session>,
    lease: u64,
    open: bool,
    pub(crate) answers: Vec<u8>,
    pub(crate) slots: Vec<u32>,
    pub(crate) words: Vec<u64>,
}

impl WriteLease {
    pub(crate) fn new(session: Arc<Session>, lease: u64, hashes: usize) -> Self {
        let (answers, slots) = (Vec::with_capacity(hashes), Vec::with_capacity(hashes));
        Self { session, lease, open: lease != 0, answers, slots, words: Vec::with_capacity(hashes) }
    }

    /// Number of the lease, for commit and abort; 0 where nothing was granted.
    #[must_use]
    pub fn lease_id(&self) -> u64 {
        self.lease
    }

    /// A [`kvmp_core::wire::Answer`] for each hash.
    #[must_use]
    pub fn answers(&self) -> &[u8] {
        &self.answers
    }

    /// Slot numbers, valid where granted.
    #[must_use]
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Slot words, valid where granted.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Life of the server that granted it.
    #[must_use]
    pub fn server_epoch(&self) -> u64 {
        self.session.epoch
    }

    /// Identity of the segment that the slots are in.
    #[must_use]
    pub fn segment_id(&self) -> &str {
        &self.session.segment_id
    }

    /// A worker has been told of it: from here on workers commit or abort, and a drop cancels nothing.
    pub fn hand_over(&mut self) {
        self.open = false;
    }

    /// Gives it up without waiting; nothing happens once it was handed over or cancelled.
    pub fn cancel(&mut self) {
        if std::mem::take(&mut self.open) {
            self.session.owe(Op::Cancel, self.lease);
        }
    }
}

impl Drop for WriteLease {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Whether each slot still has the word it was leased with. To be called when a copy out of the slots has ended.
pub(crate) fn check(table: &TableMap, slots: &[u32], words: &[u64]) -> Vec<bool> {
    // Pairs with the server's Release fence behind the word's store: a copy that read a byte of a later grant is
    // followed by a load that finds that grant's word.
    fence(Ordering::Acquire);
    slots.iter().zip(words).map(|(&slot, &word)| word_of(table, SlotId(slot)) == Some(word)).collect()
}

/// A slot's word; `None` where there is none.
pub(crate) fn word_of(table: &TableMap, slot: SlotId) -> Option<u64> {
    record_of(table, slot).map(|record| record.word().0)
}

/// A slot's record; `None` where there is none. The chunk's word is asked first: the record of a chunk without memory
/// must not be touched, as that would take memory from the file system.
pub(crate) fn record_of(table: &TableMap, slot: SlotId) -> Option<RecordCells<'_>> {
    let chunk = table.layout().geometry.chunk_of(slot)?;
    match table.chunk(chunk)? {
        ChunkWord::Assigned(_) | ChunkWord::Draining(_) => table.record(slot),
        ChunkWord::Cold | ChunkWord::Free => None,
    }
}
