//! A segment with any damage as a server finds it: it starts on it or replaces it, and no block is served whose record is
//! not whole and asked for.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::Geometry;
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, NamespaceId, PartId, SlotId};
use kvmp_core::segment::{Access, ChunkWord, HOLDERS, Layout, Mapping, NAMESPACES, TableMap, holder_offset};
use kvmp_core::slot::{BlockIdentity, PartSum, SlotState};
use kvmp_core::store::{BlockStore, ReserveAnswer};

use super::bytes::Bytes;
use super::stage::{PARTS, config, key, specs};
use crate::plane::Namespaces;
use crate::recovery::recover;
use crate::segment::{Claim, Found, SegmentFile, SegmentTable, segment_path};

const ENGINE: EngineToken = EngineToken(1);
/// Pieces of damage of one input.
const PIECES: usize = 64;
/// Blocks of each chain in the segment that is damaged.
const CHAIN: u32 = 24;

/// A segment as a killed server leaves it: what lies in it, without the empty rest.
pub struct Quarry {
    geometry: Geometry,
    pages: Vec<(u64, Vec<u8>)>,
}

/// What a start made of it, for the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub replaced: bool,
    pub kept: u64,
    pub quarantined: u64,
}

/// A start up to the first client; no memory is made, as nobody writes there.
fn start(config: &crate::ServerConfig, geometry: Geometry) -> (Arc<SegmentFile>, BlockStore<SegmentTable>, Outcome) {
    let segment = Arc::new(Claim::new(config, geometry).unwrap().open().unwrap());
    segment.unlink();
    let mut namespaces = Namespaces::new(Arc::clone(&segment));
    let mut recovery = recover(
        &segment,
        &mut namespaces,
        kvmp_core::policy::factory("lru").unwrap(),
        SegmentTable::new(segment.table.clone()),
    );
    for chunk in recovery.cold.iter().filter(|chunk| segment.table.evict_strays(**chunk)) {
        recovery.store.chunk_backed(*chunk);
    }
    recovery.store.backing_ended();
    let outcome = Outcome {
        replaced: matches!(segment.found, Found::Replaced(_)),
        kept: recovery.report.kept,
        quarantined: recovery.report.quarantined,
    };
    (segment, recovery.store, outcome)
}

fn chain(seed: u8, blocks: u32) -> Vec<BlockKey> {
    (0..blocks).map(|block| BlockKey(key(seed, block))).collect()
}

/// Reserves a chain and commits all of it but the last `open` blocks.
fn store_chain(store: &mut BlockStore<SegmentTable>, namespace: u16, group: u16, seed: u8, open: usize) {
    let (namespace, group) = (NamespaceId(namespace), GroupId(group));
    let Ok(mut cursor) = store.reserve_begin(ENGINE, namespace, group, None, 0, Ticks(5)) else { return };
    let mut answers = Vec::new();
    store.reserve_step(&mut cursor, &chain(seed, CHAIN), &mut answers);
    let Some(lease) = store.reserve_finish(cursor).lease else { return };
    let granted = answers.iter().filter_map(|answer| match answer {
        ReserveAnswer::Granted(slot, word) => Some((*slot, *word, PartSum::default())),
        _ => None,
    });
    let slots: Vec<_> = granted.collect();
    let done = &slots[..slots.len() - open.min(slots.len())];
    for part in 0..PARTS as u16 {
        store.commit(ENGINE, lease, PartId(part), done);
    }
}

impl Quarry {
    #[must_use]
    pub fn new() -> Self {
        let (config, geometry) = config();
        let (segment, mut store, _) = start(&config, geometry);
        let mut namespaces = Namespaces::new(Arc::clone(&segment));
        for (id, spec) in (0..).map(NamespaceId).zip(specs()) {
            store.add_namespace(id, &spec).unwrap();
            namespaces.insert(id, Arc::new(spec)).unwrap();
        }
        for (namespace, group, seed, open) in [(0, 0, 1, 0), (0, 0, 2, 6), (1, 0, 3, 0), (1, 1, 4, 2)] {
            store_chain(&mut store, namespace, group, seed, open);
        }
        assert_eq!(segment.table.chunk(ChunkId(1)), Some(ChunkWord::Assigned(PARTS as u32)));
        Self { geometry, pages: pages_of(segment.file(), segment.table.layout()) }
    }

    /// A file of it, for a server of these settings.
    fn lay(&self, config: &crate::ServerConfig) -> File {
        let path = segment_path(&config.arena_dir, &config.name);
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path).unwrap();
        file.set_len(Layout::new(self.geometry).file_bytes()).unwrap();
        self.pages.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        file
    }
}

impl Default for Quarry {
    fn default() -> Self {
        Self::new()
    }
}

/// The pages before the chunks that are not empty.
fn pages_of(file: &File, layout: &Layout) -> Vec<(u64, Vec<u8>)> {
    let ranges = [(0, holder_offset(HOLDERS)), layout.namespace_entry(0), layout.namespace_entry(1)];
    let tables = (0..2).map(|chunk| layout.chunk_table(ChunkId(chunk)));
    let words = (layout.chunk_word(ChunkId(0)), 4096);
    let read = |(at, len): (u64, u64)| {
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, at).unwrap();
        (at, bytes)
    };
    ranges
        .into_iter()
        .chain(tables)
        .chain([words])
        .map(read)
        .filter(|(_, bytes)| bytes.iter().any(|&b| b != 0))
        .collect()
}

/// Damages a segment as the input says, and starts on it.
pub fn segment(quarry: &Quarry, data: &[u8]) -> Outcome {
    let mut input = Bytes::new(data);
    let (config, geometry) = config();
    let file = quarry.lay(&config);
    for _ in 0..PIECES {
        if input.is_empty() {
            break;
        }
        damage(&file, quarry.geometry, &mut input);
    }
    let (segment, mut store, outcome) = start(&config, geometry);
    assert!(!outcome.replaced || outcome.kept + outcome.quarantined == 0);
    look_as_a_client(&segment.table);
    assert_eq!(store.validate(), Ok(()));
    only_whole_blocks_are_hit(&segment.table, &mut store);
    go_on(&mut store);
    outcome
}

fn damage(file: &File, geometry: Geometry, input: &mut Bytes<'_>) {
    let layout = Layout::new(geometry);
    let (kind, place) = (input.u8(), input.u16());
    // Of the chunk that has blocks: no server leaves a record in one that is Free, and only a whole one would count.
    let slot = geometry.slot(ChunkId(1), u32::from(place) % geometry.chunk_pages());
    let record = layout.record(slot).unwrap();
    match kind & 7 {
        0 => splash(file, u64::from(place) % 256, input),
        1 => splash(file, layout.chunk_word(ChunkId(u32::from(place) % 2)), input),
        2 => splash(file, record + u64::from(kind >> 3), input),
        3 => splash(file, layout.namespace_entry(u32::from(place) % 3).0 + u64::from(place >> 4), input),
        // The bits of namespaces that are used.
        4 => splash(file, 512 + u64::from(place) % 512, input),
        5 => drop(file.set_len(u64::from(input.u32()) * 64)),
        6 => forge(file, &layout, slot, input),
        // A word that a server could have written.
        _ => {
            let word = [ChunkWord::Cold, ChunkWord::Draining(PARTS as u32), ChunkWord::Assigned(PARTS as u32)];
            table_of(file, &layout)
                .into_iter()
                .for_each(|table| table.set_chunk(ChunkId(1), word[usize::from(place % 3)]));
        }
    }
}

fn splash(file: &File, at: u64, input: &mut Bytes<'_>) {
    let len = usize::from(input.u8());
    // Past the end of a file that was made shorter it would grow again.
    if at + (len as u64) < file.metadata().unwrap().len() {
        file.write_all_at(input.take(len), at).unwrap();
    }
}

/// The table of a file that is long enough to have one.
fn table_of(file: &File, layout: &Layout) -> Option<TableMap> {
    let bytes = layout.table_bytes();
    let whole = file.metadata().unwrap().len() >= bytes;
    whole.then(|| TableMap::new(Mapping::new(file, 0, bytes, Access::ReadWrite).unwrap(), *layout))
}

/// A record that is whole, of any block.
fn forge(file: &File, layout: &Layout, slot: SlotId, input: &mut Bytes<'_>) {
    let Some(table) = table_of(file, layout) else { return };
    let record = table.record(slot).unwrap();
    let (shape, seed) = (input.u8(), input.u8());
    let position = u32::from(input.u8());
    record.grant(&BlockIdentity {
        key: BlockKey(key(seed % 8, position)),
        namespace: NamespaceId(u16::from(shape & 3)),
        group: GroupId(u16::from(shape >> 2 & 1)),
        position,
        parent: if shape & 8 == 0 { SlotId(input.u32() % 1024) } else { SlotId::NONE },
        bytes: 8192,
    });
    record.touch(input.u32());
    if shape & 16 == 0 {
        record.commit();
    }
}

/// Everything that a client reads of the table.
fn look_as_a_client(table: &TableMap) {
    for id in table.namespaces().into_iter().chain([NamespaceId(0), NamespaceId(NAMESPACES as u16)]) {
        let _ = table.namespace(id);
    }
    for slot in (0..1100).chain([u32::MAX]).map(SlotId) {
        let _ = (table.part_sum(slot, PartId(0)), table.part_sum(slot, PartId(u16::MAX)));
    }
    assert!(table.header().is_some());
}

fn only_whole_blocks_are_hit(table: &TableMap, store: &mut BlockStore<SegmentTable>) {
    for (namespace, seed) in (0..2).flat_map(|namespace| (0..8).map(move |seed| (namespace, seed))) {
        let Ok(mut cursor) = store.lookup_begin(ENGINE, NamespaceId(namespace), Ticks(9)) else { continue };
        let keys = chain(seed, CHAIN);
        store.lookup_step(&mut cursor, &keys);
        for group in store.lookup_finish(cursor).groups {
            for (at, (slot, word)) in group.slots.iter().enumerate() {
                let record = table.record(*slot).unwrap().read();
                assert!(record.whole && record.word == *word && record.word.state() == Ok(SlotState::Ready));
                assert_eq!(u32::from(record.identity.namespace.0), u32::from(namespace));
                // A group of a longer stride has every second key.
                let found = keys.iter().position(|key| *key == record.identity.key);
                assert!(found.is_some_and(|found| found >= at), "{slot:?} is another block's");
            }
        }
    }
}

/// The server's life after such a start.
fn go_on(store: &mut BlockStore<SegmentTable>) {
    for (namespace, seed) in [(0, 10), (1, 11), (0, 1), (0, 12)] {
        store_chain(store, namespace, 0, seed, 3);
        assert_eq!(store.validate(), Ok(()));
    }
    store.quarantine_release();
    store.engine_gone(ENGINE);
    store.clear(None);
    assert_eq!(store.validate(), Ok(()));
    let left = store.stats();
    assert_eq!((left.blocks_ready, left.blocks_writing, left.blocks_quarantined, left.pins), (0, 0, 0, 0));
}
