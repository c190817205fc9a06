//! The process that is killed: a store on the segment, recovered as `kvmp serve` recovers it, and an engine's calls on it
//! that never end.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::{Geometry, PAGE};
use kvmp_core::ids::{EngineToken, GroupId, LeaseId, NamespaceId, PartId, SlotId};
use kvmp_core::segment::{Access, Mapping};
use kvmp_core::slot::{PartSum, SlotWord};
use kvmp_core::store::{BlockStore, ReserveAnswer, SlotTable};

use super::blocks::{Block, CHAINS, LONGEST, Random, SPECS, layout};
use super::page::{Page, Stage, Work};
use super::table::{NotedTable, Order};
use crate::config::ConfigSource;
use crate::limits::Sources;
use crate::plane::Namespaces;
use crate::recovery::{Recovery, recover};
use crate::segment::backing::Backing;
use crate::segment::{Claim, SegmentFile, boot_clock_ns};

/// Name of the segment.
pub const SEGMENT: &str = "crash-anywhere";
pub const ENGINE: EngineToken = EngineToken(1);
const G0: GroupId = GroupId(0);
/// Reservations whose blocks are not all committed.
const OPEN_MOST: usize = 5;

/// The segment in `dir`, claimed as a server does.
pub fn claim(dir: &Path) -> Arc<SegmentFile> {
    let source = ConfigSource {
        size: Some("6MiB".into()),
        chunk: Some("2MiB".into()),
        name: Some(SEGMENT.into()),
        arena_dir: Some(dir.into()),
        socket: Some(dir.join("unused.sock")),
        tcp: Some("off".into()),
        ..ConfigSource::default()
    };
    let config = source.resolve().unwrap();
    let geometry = Geometry::new(config.size, config.chunk).unwrap();
    Arc::new(Claim::new(&config, geometry).unwrap().open().unwrap())
}

/// Now, as the data plane counts it.
pub fn now(segment: &SegmentFile) -> Ticks {
    let made_ns = segment.table.header().unwrap().made_ns;
    Ticks((boot_clock_ns() - made_ns) * Ticks::PER_SECOND / 1_000_000_000)
}

/// All chunks, each page touched: else a life would pass in page faults.
fn map_arena(segment: &SegmentFile) -> Mapping {
    let (at, bytes) = (segment.table.layout().arena_offset(), segment.table.layout().geometry.arena_bytes());
    let arena = Mapping::new(segment.file(), at, bytes, Access::ReadWrite).unwrap();
    (0..bytes).step_by(PAGE as usize).for_each(|page| arena.read(page, &mut [0]));
    arena
}

/// Recovers the segment in `dir` with its calls noted.
pub fn recovered<T: SlotTable>(segment: &Arc<SegmentFile>, table: T) -> (Recovery<T>, Namespaces) {
    let mut namespaces = Namespaces::new(Arc::clone(segment));
    let recovery = recover(segment, &mut namespaces, kvmp_core::policy::factory("lru").unwrap(), table);
    (recovery, namespaces)
}

/// What was granted and is not yet committed or aborted in all its parts.
struct Open {
    lease: LeaseId,
    blocks: Vec<(Block, SlotId, SlotWord)>,
}

struct Life {
    segment: Arc<SegmentFile>,
    store: BlockStore<NotedTable>,
    arena: Mapping,
    page: Page,
    order: Order,
    random: Random,
    open: Vec<Open>,
}

/// Lives until it is killed.
pub fn live(dir: &Path, order: Order, seed: u64) -> ! {
    let page = Page::open(dir);
    let segment = claim(dir);
    page.set_stage(Stage::Recovering);
    let mut life = page.work(Work::Recover, || Life::begin(segment, page.clone(), order, Random(seed)));
    page.set_stage(Stage::Working);
    loop {
        life.step();
    }
}

impl Life {
    fn begin(segment: Arc<SegmentFile>, page: Page, order: Order, random: Random) -> Self {
        let table = NotedTable::new(segment.table.clone(), page.clone(), order);
        let (Recovery { mut store, cold, .. }, mut namespaces) = recovered(&segment, table);
        for spec in SPECS.iter() {
            if namespaces.find(&spec.digest()).is_none() {
                let id = namespaces.free_id(|_| false).unwrap_or_else(|_| panic!("no id"));
                namespaces.insert(id, Arc::new(spec.clone())).unwrap_or_else(|_| panic!("no room"));
                store.add_namespace(id, spec).unwrap();
            }
        }
        let layout = *segment.table.layout();
        let (file, arena_dir) = (segment.file(), segment.path().parent().unwrap().to_owned());
        let backing = Backing { file, layout, arena_dir, sources: Sources::default(), stop: &AtomicBool::new(false) };
        backing.run(cold, |chunk| store.chunk_backed(chunk));
        let arena = map_arena(&segment);
        Self { store, arena, page, order, random, open: Vec::new(), segment }
    }

    fn step(&mut self) {
        let page = self.page.clone();
        match self.random.below(64) {
            0..=35 => self.store_some(),
            36..=47 => self.finish_one(),
            48..=57 => page.work(Work::Lookup, || self.look_up()),
            58 | 59 => page.work(Work::Evict, || self.evict_some()),
            60 => page.work(Work::Distrust, || self.distrust_one()),
            61 => page.work(Work::Abort, || self.cancel_one()),
            62 => {
                page.work(Work::Release, || self.store.quarantine_release());
            }
            _ => page.work(Work::Clear, || self.clear_rarely()),
        }
    }

    fn pick(&mut self) -> Vec<Block> {
        let namespace = self.random.below(SPECS.len() as u64) as u16;
        let (chain, len) = (self.random.below(CHAINS), 1 + self.random.below(LONGEST));
        Block::chain(namespace, chain, len)
    }

    /// Blocks of a chain that are there.
    fn look_up_chain(&mut self, blocks: &[Block]) -> usize {
        let keys: Vec<_> = blocks.iter().map(|block| block.key()).collect();
        let mut cursor = self.store.lookup_begin(ENGINE, NamespaceId(blocks[0].namespace), now(&self.segment)).unwrap();
        self.store.lookup_step(&mut cursor, &keys);
        let reply = self.store.lookup_finish(cursor);
        reply.lease.map(|lease| self.store.release(ENGINE, lease));
        reply.tokens as usize / 16
    }

    fn look_up(&mut self) {
        let blocks = self.pick();
        self.look_up_chain(&blocks);
    }

    /// What an engine does: looks a prompt up, reserves the rest, stores the bytes, commits now or later.
    fn store_some(&mut self) {
        let page = self.page.clone();
        let blocks = self.pick();
        let there = page.work(Work::Lookup, || self.look_up_chain(&blocks));
        if let Some(open) = page.work(Work::Reserve, || self.reserve(&blocks, there)) {
            self.open.push(open);
            self.go_on_with_last();
        }
        if self.open.len() > OPEN_MOST {
            self.finish_one();
        }
    }

    /// The engine stores the bytes, or has no use for the slots after all and cancels.
    fn go_on_with_last(&mut self) {
        let page = self.page.clone();
        if self.random.below(3) == 0 {
            page.work(Work::Abort, || self.cancel_one());
        } else if self.order != Order::CommitBeforeBytes {
            let Some(open) = self.open.last() else { return };
            page.work(Work::WriteBytes, || self.write(open));
        }
    }

    fn reserve(&mut self, blocks: &[Block], there: usize) -> Option<Open> {
        let rest = blocks.get(there..).filter(|rest| !rest.is_empty())?;
        let keys: Vec<_> = rest.iter().map(|block| block.key()).collect();
        let (namespace, parent) = (NamespaceId(rest[0].namespace), there.checked_sub(1).map(|last| blocks[last].key()));
        let begun = self.store.reserve_begin(ENGINE, namespace, G0, parent, there as u32, now(&self.segment));
        let (mut cursor, mut answers) = (begun.unwrap(), Vec::new());
        self.store.reserve_step(&mut cursor, &keys, &mut answers);
        let lease = self.store.reserve_finish(cursor).lease?;
        let granted = |(block, answer): (&Block, &ReserveAnswer)| match answer {
            ReserveAnswer::Granted(slot, word) => Some((*block, *slot, *word)),
            _ => None,
        };
        Some(Open { lease, blocks: rest.iter().zip(&answers).filter_map(granted).collect() })
    }

    /// Stores every part of what was granted.
    fn write(&self, open: &Open) {
        // Between the grant and the first byte, as a client does.
        fence(Ordering::Release);
        let table = self.segment.table.layout();
        for (block, slot, _) in &open.blocks {
            let at = table.slot_in_arena(*slot, layout(block.namespace).pages).unwrap();
            for (part, place) in block.parts() {
                self.arena.write(at + place.offset, &block.bytes(part));
            }
        }
    }

    /// Commits every part of the oldest reservation, part by part; or some only, and aborts the others.
    fn finish_one(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let page = self.page.clone();
        let mut open = self.open.remove(0);
        let parts = layout(open.blocks[0].0.namespace).parts.len() as u16;
        let kept =
            if self.random.below(8) == 0 { self.random.below(open.blocks.len() as u64) as usize } else { usize::MAX };
        let aborted = open.blocks.split_off(kept.min(open.blocks.len()));
        for part in (0..parts).map(PartId) {
            page.work(Work::CommitPart, || self.commit(&open, part));
            let slots: Vec<_> = aborted.iter().map(|(_, slot, word)| (*slot, *word)).collect();
            page.work(Work::Abort, || self.store.abort(ENGINE, open.lease, part, &slots));
        }
        if self.order == Order::CommitBeforeBytes {
            page.work(Work::WriteBytes, || self.write(&open));
        }
    }

    fn commit(&mut self, open: &Open, part: PartId) {
        let slots: Vec<(SlotId, SlotWord, PartSum)> =
            open.blocks.iter().map(|(block, slot, word)| (*slot, *word, block.sum(part.0))).collect();
        self.store.commit(ENGINE, open.lease, part, &slots);
    }

    fn cancel_one(&mut self) {
        if let Some(open) = self.open.pop() {
            self.store.cancel(ENGINE, open.lease);
        }
    }

    fn evict_some(&mut self) {
        let (namespace, n) = (self.random.below(SPECS.len() as u64) as u16, self.random.below(60));
        // Fewer victims than asked for is an answer, too.
        let _ = self.store.evict(layout(namespace).pages, n);
    }

    fn distrust_one(&mut self) {
        let slot = SlotId(self.random.below(3 * 512) as u32);
        let word = self.store.table().word(slot);
        self.store.distrust(slot, word);
    }

    fn clear_rarely(&mut self) {
        let namespace = NamespaceId(self.random.below(SPECS.len() as u64) as u16);
        if self.random.below(8) == 0 {
            self.store.clear(Some(namespace));
        }
    }
}
