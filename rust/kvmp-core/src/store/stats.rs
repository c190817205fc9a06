//! Counters and gauges.

use super::BlockStore;
use super::answers::ReserveAnswer;
use super::blocks::BlockState;
use super::table::SlotTable;

/// What only goes up, and the pins.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pub lookups: u64,
    pub lookup_blocks: u64,
    pub lookup_hit_blocks: u64,
    pub reserves: u64,
    /// By the code of the answer.
    pub answers: [u64; 7],
    pub committed_parts: u64,
    pub committed_blocks: u64,
    pub aborted_parts: u64,
    pub refused_parts: u64,
    pub refused_releases: u64,
    pub evictions: u64,
    pub cleared: u64,
    pub chunk_moves: u64,
    pub recovered_blocks: u64,
    pub distrusted_blocks: u64,
    pub pins: u64,
}

impl Counters {
    pub fn count_answer(&mut self, answer: ReserveAnswer) {
        self.answers[usize::from(answer.code())] += 1;
    }
}

/// Slots that are not Free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ByState {
    pub writing: u64,
    pub ready: u64,
    pub quarantined: u64,
    /// Never counted up: a place for `of(Free)`.
    pub free: u64,
}

impl ByState {
    pub fn of(&mut self, state: BlockState) -> &mut u64 {
        match state {
            BlockState::Free => &mut self.free,
            BlockState::Writing => &mut self.writing,
            BlockState::Ready => &mut self.ready,
            BlockState::Quarantined => &mut self.quarantined,
        }
    }
}

/// The block store's statistics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct StoreStats {
    /// Bytes of all chunks.
    pub arena_bytes: u64,
    /// Bytes of chunks with memory behind them.
    pub backed_bytes: u64,
    /// More chunks may come.
    pub warming: bool,
    /// Chunks that no slot size has.
    pub chunks_free: u64,
    /// Slots of the chunks that a slot size has.
    pub slots_total: u64,
    /// Free ones of these.
    pub slots_free: u64,
    /// Slots with a visible block.
    pub blocks_ready: u64,
    /// Slots with a block that is being written.
    pub blocks_writing: u64,
    /// Slots out of use until their writers are gone.
    pub blocks_quarantined: u64,
    /// Engines that asked for anything and are not gone.
    pub engines: u64,
    /// Namespaces.
    pub namespaces: u64,
    /// Lookups begun.
    pub lookups: u64,
    /// Keys they brought.
    pub lookup_blocks: u64,
    /// Blocks they hit, over all groups.
    pub lookup_hit_blocks: u64,
    /// Reservations begun.
    pub reserves: u64,
    /// Answers `Granted`.
    pub granted: u64,
    /// Answers `Present`.
    pub present: u64,
    /// Answers `Pending`.
    pub pending: u64,
    /// Answers `NoParent`.
    pub no_parent: u64,
    /// Answers `NoSpace`.
    pub no_space: u64,
    /// Answers `NotAdmitted`.
    pub not_admitted: u64,
    /// Answers `Warming`.
    pub warming_answers: u64,
    /// Parts committed.
    pub committed_parts: u64,
    /// Blocks that became Ready by a commit.
    pub committed_blocks: u64,
    /// Parts aborted, by their writer, a cancel or a death.
    pub aborted_parts: u64,
    /// Slots in commits and aborts that were refused.
    pub refused_parts: u64,
    /// Releases of leases that were not there.
    pub refused_releases: u64,
    /// Blocks evicted for room, or with a block they hung on.
    pub evictions: u64,
    /// Blocks evicted by `clear`.
    pub cleared: u64,
    /// Pins held now.
    pub pins: u64,
    /// Read leases held now.
    pub read_leases: u64,
    /// Write leases held now.
    pub write_leases: u64,
    /// Chunks taken from one slot size for another.
    pub chunk_moves: u64,
    /// Blocks kept by a recovery.
    pub recovered_blocks: u64,
    /// Blocks evicted because a reader found their bytes wrong; what hung on them counts as evictions.
    pub distrusted_blocks: u64,
}

impl<T: SlotTable> BlockStore<T> {
    /// What the store counts.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let c = &self.counters;
        let [granted, present, pending, no_parent, no_space, not_admitted, warming_answers] = c.answers;
        let geometry = &self.config.geometry;
        let slots_total = self.slots_total();
        let used = &self.blocks_by_state;
        StoreStats {
            arena_bytes: geometry.arena_bytes(),
            backed_bytes: geometry.chunk_bytes * u64::from(geometry.chunks - self.chunks.cold),
            warming: self.chunks.warming(),
            chunks_free: self.chunks.free.len() as u64,
            slots_total,
            slots_free: slots_total - used.ready - used.writing - used.quarantined,
            blocks_ready: used.ready,
            blocks_writing: used.writing,
            blocks_quarantined: used.quarantined,
            engines: self.engines.len() as u64,
            namespaces: self.namespaces.iter().flatten().count() as u64,
            lookups: c.lookups,
            lookup_blocks: c.lookup_blocks,
            lookup_hit_blocks: c.lookup_hit_blocks,
            reserves: c.reserves,
            granted,
            present,
            pending,
            no_parent,
            no_space,
            not_admitted,
            warming_answers,
            committed_parts: c.committed_parts,
            committed_blocks: c.committed_blocks,
            aborted_parts: c.aborted_parts,
            refused_parts: c.refused_parts,
            refused_releases: c.refused_releases,
            evictions: c.evictions,
            cleared: c.cleared,
            pins: c.pins,
            read_leases: self.reads.len() as u64,
            write_leases: self.writes.len() as u64,
            chunk_moves: c.chunk_moves,
            recovered_blocks: c.recovered_blocks,
            distrusted_blocks: c.distrusted_blocks,
        }
    }

    fn slots_total(&self) -> u64 {
        self.classes.iter().map(|class| u64::from(class.chunks) * u64::from(class.slots)).sum()
    }
}
