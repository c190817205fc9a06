//! The block store: leases, states and index of every block in a segment.
//!
//! `Free -> Writing{open parts} -> Ready{pins} -> Free`; a writer that dies, leaves or aborts makes it
//! `Writing -> Quarantined -> Free`, never visible.
//!
//! Pure and single-threaded: time, backing and deaths are told, words and records go through a
//! [`SlotTable`]. The same calls give the same answers.

mod answers;
mod blocks;
mod chunks;
mod commit;
mod deaths;
mod drain;
mod evict;
mod index;
mod leases;
mod lookup;
mod namespaces;
mod radix;
mod recover;
mod reserve;
mod stats;
mod table;
mod validate;

use std::collections::BTreeMap;

use crate::clock::Ticks;
use crate::geometry::Geometry;
use crate::ids::{BlockKey, ChunkId, EngineToken, GroupId, LeaseId, NamespaceId, SlotId};
use crate::policy::PolicyFactory;

pub use answers::{
    AbortReply, CommitReply, GroupHit, LookupReply, ReserveAnswer, ReserveReply, StoreError, TooFewVictims,
};
pub use evict::ClearCursor;
pub use lookup::LookupCursor;
pub use recover::{FoundRecord, Recovered};
pub use reserve::ReserveCursor;
pub use stats::StoreStats;
pub use table::{ChunkState, HeapRecord, HeapTable, SlotTable};

use blocks::Blocks;
use chunks::{Chunks, SizeClass};
use drain::Drain;
use index::Index;
use leases::{Engine, ReadLease, WriteLease};
use namespaces::Namespace;
use recover::Recovery;
use stats::{ByState, Counters};

/// What a store is made with.
#[derive(Clone, Copy, Debug)]
pub struct StoreConfig {
    /// Chunks of the segment.
    pub geometry: Geometry,
    /// How long a read lease lasts at most.
    pub read_ttl: Ticks,
}

impl StoreConfig {
    /// How long a read lease lasts unless said otherwise.
    pub const READ_TTL: Ticks = Ticks(60 * Ticks::PER_SECOND);

    /// The usual TTL.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self { geometry, read_ttl: Self::READ_TTL }
    }
}

/// See the module.
pub struct BlockStore<T: SlotTable> {
    config: StoreConfig,
    table: T,
    policy: PolicyFactory,
    blocks: Blocks,
    /// Ready and Writing blocks.
    index: Index,
    chunks: Chunks,
    /// Slot sizes in the order they were first used.
    classes: Vec<SizeClass>,
    draining: Option<Drain>,
    /// By their number.
    namespaces: Vec<Option<Namespace>>,
    engines: BTreeMap<EngineToken, Engine>,
    reads: BTreeMap<LeaseId, ReadLease>,
    writes: BTreeMap<LeaseId, WriteLease>,
    /// Never reused.
    last_lease: u64,
    recovery: Recovery,
    /// Quarantined by the recovery; no lease holds them.
    held: Vec<SlotId>,
    blocks_by_state: ByState,
    counters: Counters,
    /// Half the arena: cap of an engine's pins, and of what it writes.
    cap_pages: u64,
    /// log2 of the slot numbers in a chunk.
    chunk_shift: u32,
}

impl<T: SlotTable> BlockStore<T> {
    /// A store of Cold chunks.
    #[must_use]
    pub fn new(config: StoreConfig, table: T, policy: PolicyFactory) -> Self {
        let geometry = &config.geometry;
        Self {
            table,
            policy,
            blocks: Blocks::new(geometry),
            index: Index::default(),
            chunks: Chunks::new(geometry),
            classes: Vec::new(),
            draining: None,
            namespaces: Vec::new(),
            engines: BTreeMap::new(),
            reads: BTreeMap::new(),
            writes: BTreeMap::new(),
            last_lease: 0,
            recovery: Recovery::default(),
            held: Vec::new(),
            blocks_by_state: ByState::default(),
            counters: Counters::default(),
            cap_pages: u64::from(geometry.chunks) * u64::from(geometry.chunk_pages()) / 2,
            chunk_shift: geometry.chunk_pages().ilog2(),
            config,
        }
    }

    /// The slot table.
    #[must_use]
    pub fn table(&self) -> &T {
        &self.table
    }

    /// The store is done with it.
    #[must_use]
    pub fn into_table(self) -> T {
        self.table
    }

    fn find(&self, namespace: NamespaceId, group: GroupId, key: &BlockKey) -> Option<SlotId> {
        self.index.find(&self.blocks.hot, index::hash(namespace, group, key), namespace, group, key)
    }

    /// Chunks of a slot size, the draining one too.
    fn chunks_of(&self, class: usize) -> Vec<ChunkId> {
        let assigned = |c: &chunks::Chunk| c.class == class && c.state.has_slots();
        let all = self.chunks.all.iter().enumerate();
        all.filter(|(_, chunk)| assigned(chunk)).map(|(id, _)| ChunkId(id as u32)).collect()
    }
}
