//! Rebuilds the store from an existing segment; a new one gives an empty store by the same path.

use std::time::{Duration, Instant};

use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::policy::PolicyFactory;
use kvmp_core::segment::{ChunkWord, Record, RecordCells, TableMap};
use kvmp_core::slot::SlotState;
use kvmp_core::store::{BlockStore, FoundRecord, Recovered, SlotTable, StoreConfig};

use crate::plane::Namespaces;
use crate::segment::SegmentFile;

/// What recovery leaves for the start to go on with.
pub(crate) struct Recovery<T: SlotTable> {
    pub store: BlockStore<T>,
    /// Chunks that have no memory yet.
    pub cold: Vec<ChunkId>,
    pub report: Recovered,
    /// From the first look at the file until the index was whole.
    pub took: Duration,
}

/// Rebuilds the store, which writes through `table`; a start that dies on the way is counted in the header.
pub(crate) fn recover<T: SlotTable>(
    segment: &SegmentFile,
    namespaces: &mut Namespaces,
    policy: PolicyFactory,
    table: T,
) -> Recovery<T> {
    let begun = Instant::now();
    segment.recovering();
    let store = BlockStore::new(StoreConfig::new(segment.table.layout().geometry), table, policy);
    let mut recovery = read_table(segment, namespaces, store);
    segment.recovered();
    recovery.took = begun.elapsed();
    recovery
}

/// Reads chunk words and records and hands them to a new store.
fn read_table<T: SlotTable>(
    segment: &SegmentFile,
    namespaces: &mut Namespaces,
    mut store: BlockStore<T>,
) -> Recovery<T> {
    let table = &segment.table;
    let geometry = table.layout().geometry;
    for (id, spec) in namespaces.recover() {
        if let Err(e) = store.add_namespace(id, &spec) {
            tracing::warn!("namespace {} is dropped: {e}", id.0);
            namespaces.remove(id);
        }
    }
    store.recover_begin(slots(table));
    let (mut cold, mut last) = (Vec::new(), None);
    for chunk in (0..geometry.chunks).map(ChunkId) {
        let word = table.chunk(chunk);
        last = if word == Some(ChunkWord::Cold) { last } else { Some(chunk) };
        match word {
            Some(ChunkWord::Cold) => cold.push(chunk),
            Some(ChunkWord::Free) => store.chunk_backed(chunk),
            Some(ChunkWord::Assigned(pages) | ChunkWord::Draining(pages)) => {
                if let Err(e) = store.recover_chunk(chunk, pages, records(table, chunk, pages)) {
                    // Not handed out: its slots may still be written by whoever thinks otherwise.
                    tracing::warn!("{e}; the chunk is left out");
                }
            }
            None => tracing::warn!("chunk {} has a word that means nothing; it is left out", chunk.0),
        }
    }
    last.into_iter().for_each(|chunk| segment.has_memory(chunk));
    let report = store.recover_finish();
    Recovery { store, cold, report, took: Duration::ZERO }
}

/// Slots of all assigned chunks: as many blocks may be found.
fn slots(table: &TableMap) -> u64 {
    let geometry = table.layout().geometry;
    let of = |chunk| match table.chunk(chunk) {
        Some(ChunkWord::Assigned(pages) | ChunkWord::Draining(pages)) => u64::from(geometry.slots_per_chunk(pages)),
        _ => 0,
    };
    (0..geometry.chunks).map(ChunkId).map(of).sum()
}

/// Records of a chunk that are not Free.
fn records(table: &TableMap, chunk: ChunkId, pages: u32) -> impl Iterator<Item = FoundRecord> {
    let geometry = table.layout().geometry;
    let records = table.records(chunk, geometry.slots_per_chunk(pages));
    (geometry.slot(chunk, 0).0..).map(SlotId).zip(records).filter_map(|(slot, record)| found(slot, &record))
}

fn found(slot: SlotId, record: &RecordCells<'_>) -> Option<FoundRecord> {
    if record.word().state() == Ok(SlotState::Free) {
        return None;
    }
    let Record { word, identity, touched, whole } = record.read();
    Some(FoundRecord { slot, word, identity: whole.then_some(identity), touched })
}
