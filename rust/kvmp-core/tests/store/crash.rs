//! At any point between two calls the store is dropped and a new one recovered from its table, as after a SIGKILL.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use kvmp_core::ids::{LeaseId, SlotId};
use kvmp_core::policy;
use kvmp_core::store::{BlockStore, FoundRecord, HeapTable, Recovered, StoreConfig};

use crate::fixture::{FoundChunks, found_everywhere, recover};
use crate::logged::{Event, LoggedTable};
use crate::model::Model;
use crate::property::{CHUNKS, Fault, World};

/// Lease of what a crash left Writing: no store gave it.
const NOBODYS: LeaseId = LeaseId(u64::MAX);

/// What the crashes of all cases met.
#[derive(Clone, Default, Debug)]
pub struct Crashes {
    /// All of them.
    pub all: u64,
    /// Those that found a Ready block.
    pub with_ready: u64,
    /// Those that found a block being written.
    pub with_writing: u64,
    /// Those that found slots still held back by the crash before.
    pub with_held: u64,
    /// Those that found Ready blocks with a gap in the chain before them.
    pub with_gaps: u64,
    /// Slots held back that came back when the old writers were gone.
    pub released: u64,
}

impl Crashes {
    pub fn least(&self) -> u64 {
        let all = [self.all, self.with_ready, self.with_writing, self.with_held, self.released];
        // Gaps take commits out of order.
        all.into_iter().min().unwrap_or(0).min(self.with_gaps * 10)
    }
}

impl World {
    /// What is Ready with its whole chain is there again, and what was Writing is held back.
    pub fn crash(&mut self) -> Result<(), String> {
        self.count_crash();
        let expected = self.model.restart(self.backed < CHUNKS);
        let report = self.start_anew();
        if report != expected {
            return Err(format!("{report:?}, the model says {expected:?}"));
        }
        let evictions = self.store.table().take_events();
        let only = evictions.iter().all(|event| matches!(event, Event::Evict(_)));
        if !only || evictions.len() as u64 != report.evicted {
            return Err(format!("{evictions:?} for {report:?}"));
        }
        self.check_words()
    }

    /// A store on the table of the one before, which goes without a word.
    fn start_anew(&mut self) -> Recovered {
        self.seen.add(&self.store.stats());
        let config = StoreConfig::new(self.store.table().inner.geometry());
        let empty = || LoggedTable::new(HeapTable::new(config.geometry));
        let new = |table| BlockStore::new(config, table, policy::factory("lru").unwrap());
        let table = std::mem::replace(&mut self.store, new(empty())).into_table();
        let mut found = found_everywhere(&table.inner);
        self.spoil(&mut found);
        self.store = new(table);
        let report = recover(&mut self.store, found, &self.specs);
        if self.fault == Fault::NoQuarantine {
            self.store.quarantine_release();
        }
        report
    }

    fn spoil(&self, found: &mut FoundChunks) {
        let records = found.iter_mut().flat_map(|(_, _, records)| records);
        match self.fault {
            Fault::NoChains => records.for_each(behead),
            Fault::NoTimes => records.for_each(|record| record.touched = 0),
            _ => {}
        }
    }

    /// A word is what it was: a reader that checks it after its copy may go on.
    fn check_words(&self) -> Result<(), String> {
        for (slot, block) in &self.model.blocks {
            let word = kvmp_core::store::SlotTable::word(self.store.table(), *slot);
            if word != block.word {
                return Err(format!("{slot:?} has {word:?}, not {:?}", block.word));
            }
        }
        Ok(())
    }

    fn count_crash(&mut self) {
        let (model, crashes) = (&self.model, &mut self.seen.crashes);
        let any = |of: &dyn Fn(&crate::model::Block) -> bool| u64::from(model.blocks.values().any(of));
        crashes.all += 1;
        crashes.with_ready += any(&|block| block.ready);
        crashes.with_writing += any(&|block| !block.ready && !block.quarantined);
        crashes.with_held += any(&|block| block.lease == NOBODYS && !block.ready);
        crashes.with_gaps += u64::from(model.blocks.iter().any(|(slot, block)| block.ready && !model.has_chain(*slot)));
    }

    /// Every writer of the stores before is gone.
    pub fn old_writers_gone(&mut self) -> Result<(), String> {
        let released = self.store.quarantine_release();
        let before = self.model.blocks.len();
        self.model.blocks.retain(|_, block| block.ready || block.lease != NOBODYS);
        self.seen.crashes.released += released;
        let expected = (before - self.model.blocks.len()) as u64;
        if released == expected { Ok(()) } else { Err(format!("{released} slots came back, not {expected}")) }
    }
}

/// Makes a record one of a chain's first block.
fn behead(record: &mut FoundRecord) {
    if let Some(identity) = &mut record.identity {
        (identity.position, identity.parent) = (0, SlotId::NONE);
    }
}

impl Model {
    /// Whether a block and all before it are Ready.
    fn has_chain(&self, slot: SlotId) -> bool {
        let block = &self.blocks[&slot];
        block.ready && block.parent.is_none_or(|parent| self.has_chain(parent))
    }

    /// Forgets what a crash forgets; says what recovery has to come to.
    fn restart(&mut self, warming: bool) -> Recovered {
        let kept: BTreeSet<SlotId> = self.blocks.keys().copied().filter(|slot| self.has_chain(*slot)).collect();
        let before = self.blocks.len();
        self.blocks.retain(|slot, block| !block.ready || kept.contains(slot));
        let evicted = before - self.blocks.len();
        for block in self.blocks.values_mut().filter(|block| !block.ready) {
            (block.quarantined, block.parent, block.lease) = (true, None, NOBODYS);
            block.open.clear();
        }
        self.reads.clear();
        self.writers.clear();
        self.warming = warming;
        self.order(&kept);
        let quarantined = self.blocks.len() - kept.len();
        Recovered { kept: kept.len() as u64, evicted: evicted as u64, quarantined: quarantined as u64 }
    }

    /// Only what records say is left of the order: coldest first, at one time from the tail.
    fn order(&mut self, kept: &BTreeSet<SlotId>) {
        let mut order: Vec<_> = kept.iter().map(|slot| (&self.blocks[slot], *slot)).collect();
        order.sort_by_key(|(block, slot)| (block.touched, Reverse(block.position), *slot));
        let order: Vec<SlotId> = order.into_iter().map(|(_, slot)| slot).collect();
        for slot in order {
            let stamp = self.stamp();
            self.blocks.entry(slot).and_modify(|block| block.stamp = stamp);
        }
    }
}
