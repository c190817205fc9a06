//! What ends with a client. The store knows no files: whoever watches the holder entries calls these.

use crate::ids::{EngineToken, LeaseId, PartId};

use super::BlockStore;
use super::table::SlotTable;

impl<T: SlotTable> BlockStore<T> {
    /// The engine's readers are gone: its pins and read leases end at once.
    pub fn reads_gone(&mut self, engine: EngineToken) {
        let reads: Vec<LeaseId> = self.reads.iter().filter(|(_, l)| l.engine == engine).map(|(id, _)| *id).collect();
        reads.into_iter().for_each(|lease| self.end_read(lease));
    }

    /// A part's writer is gone: its holder entry is free and the grace has passed. Its open parts are
    /// aborted; returns how many there were.
    pub fn part_writer_gone(&mut self, engine: EngineToken, part: PartId) -> u64 {
        let before = self.counters.aborted_parts;
        for lease in self.write_leases_of(engine) {
            self.abort_parts(lease, Some(part));
        }
        self.counters.aborted_parts - before
    }

    /// The engine is gone with all its writers: its reads end, and all its open parts are aborted.
    pub fn engine_gone(&mut self, engine: EngineToken) {
        self.reads_gone(engine);
        for lease in self.write_leases_of(engine) {
            self.abort_parts(lease, None);
        }
        self.engines.remove(&engine);
    }

    fn write_leases_of(&self, engine: EngineToken) -> Vec<LeaseId> {
        self.writes.iter().filter(|(_, lease)| lease.engine == engine).map(|(id, _)| *id).collect()
    }
}
