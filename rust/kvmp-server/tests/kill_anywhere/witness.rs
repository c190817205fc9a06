//! What must hold after each kill: in the raw records, before anything has repaired them, and in what recovery makes of them.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use kvmp_core::ids::{ChunkId, NamespaceId, PartId, SlotId};
use kvmp_core::segment::{Access, ChunkWord, Mapping, Record, RecordCells};
use kvmp_core::slot::{SlotState, SlotWord};
use kvmp_core::store::BlockStore;

use super::blocks::{Block, CHAINS, LONGEST, SPECS, layout};
use super::life::{ENGINE, claim, now, recovered};
use crate::recovery::Recovery;
use crate::segment::{SegmentFile, SegmentTable};

type Check = Result<(), String>;

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(why()) }
}

/// A record as a kill left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    word: SlotWord,
    /// All but word and time of the last use.
    fields: [u64; 7],
}

/// What one kill left.
#[derive(Clone, Copy, Debug, Default)]
pub struct Left {
    /// Blocks kept, every byte of them checked.
    pub kept: u64,
    /// Slots held back.
    pub quarantined: u64,
    /// Records that the kill left in the middle of a grant: neither the old block's nor the new one's.
    pub torn: u64,
    /// Records that the kill left in the middle of a commit: the check is there, the word is not.
    pub sealed: u64,
}

/// Remembers every record, from kill to kill.
#[derive(Default)]
pub struct Witness {
    seen: Vec<Option<Seen>>,
    /// Mapped once: all lives have one file.
    arena: Option<Mapping>,
}

/// What the raw records came to, and what recovery did.
pub struct Verdict {
    pub raw: Check,
    pub served: Check,
    pub left: Left,
}

impl Witness {
    /// Looks at the segment that a kill left, recovers it, and looks again.
    pub fn examine(&mut self, dir: &Path) -> Verdict {
        let segment = claim(dir);
        let mut left = Left::default();
        let raw = self.check_records(&segment, &mut left);
        let arena = self.arena.get_or_insert_with(|| map_arena(&segment));
        let served = check_recovered(&segment, arena, &mut left);
        self.remember(&segment);
        Verdict { raw, served, left }
    }

    fn check_records(&mut self, segment: &SegmentFile, left: &mut Left) -> Check {
        let geometry = segment.table.layout().geometry;
        self.seen.resize((geometry.chunks * geometry.chunk_pages()) as usize, None);
        for slot in all_slots(segment) {
            let record = segment.table.record(slot).unwrap();
            let read = record.read();
            let why = check_record(segment, slot, &read, &look(&record), self.seen[slot.0 as usize]);
            why.map_err(|why| format!("{slot:?}: {why}; {read:?}, last seen {:?}", self.seen[slot.0 as usize]))?;
            if read.word.state() == Ok(SlotState::Writing) {
                left.torn += u64::from(!fits_its_key(&read));
                left.sealed += u64::from(read.whole);
            }
        }
        Ok(())
    }

    fn remember(&mut self, segment: &SegmentFile) {
        for slot in all_slots(segment) {
            self.seen[slot.0 as usize] = Some(look(&segment.table.record(slot).unwrap()));
        }
    }
}

/// Through a descriptor of its own: a mapping keeps its file open, and with it the file's lock.
fn map_arena(segment: &SegmentFile) -> Mapping {
    let (layout, file) = (segment.table.layout(), File::open(segment.path()).unwrap());
    Mapping::new(&file, layout.arena_offset(), layout.geometry.arena_bytes(), Access::Read).unwrap()
}

/// Slots of the chunks that have memory, whatever their size: records lie where they lie.
fn all_slots(segment: &SegmentFile) -> Vec<SlotId> {
    let geometry = segment.table.layout().geometry;
    let backed = (0..geometry.chunks).map(ChunkId).filter(|chunk| segment.table.chunk(*chunk) != Some(ChunkWord::Cold));
    backed.flat_map(|chunk| (0..geometry.chunk_pages()).map(move |index| geometry.slot(chunk, index))).collect()
}

fn look(record: &RecordCells<'_>) -> Seen {
    let cells: [u64; 8] = std::array::from_fn(|cell| record.0[cell].load(std::sync::atomic::Ordering::Acquire));
    let mut fields: [u64; 7] = std::array::from_fn(|cell| cells[cell + 1]);
    fields[5] &= 0xffff_ffff;
    Seen { word: SlotWord(cells[0]), fields }
}

fn check_record(segment: &SegmentFile, slot: SlotId, read: &Record, now: &Seen, last: Option<Seen>) -> Check {
    let state = read.word.state().map_err(|raw| format!("state {raw}"))?;
    if let Some(last) = last {
        ensure(now.word.generation() >= last.word.generation(), || "the generation went back".into())?;
        if now.word.generation() == last.word.generation() {
            return check_same_generation(state, now, &last);
        }
    }
    match state {
        SlotState::Ready => check_ready(segment, slot, read),
        // Granted in full, then aborted (and never sealed) or committed and evicted.
        SlotState::Free if now.word.generation() > 0 => {
            let sealed = now.fields[6] >> 32 != 0;
            ensure(fits_its_key(read) && (read.whole || !sealed), || "Free with the fields of no block".into())
        }
        _ => Ok(()),
    }
}

/// Nobody but the life that granted it changes more of a record than its state, and that only towards Free, whose check goes.
fn check_same_generation(state: SlotState, now: &Seen, last: &Seen) -> Check {
    let before = last.word.state().map_err(|raw| format!("state {raw}"))?;
    let legal = state == before || state == SlotState::Free;
    ensure(legal, || format!("{before:?} became {state:?} in another life"))?;
    let mut fields = last.fields;
    if state == SlotState::Free && now.fields[6] >> 32 == 0 {
        fields[6] &= 0xffff_ffff;
    }
    ensure(now.fields == fields, || "fields changed under a word of the same generation".into())
}

fn check_ready(segment: &SegmentFile, slot: SlotId, read: &Record) -> Check {
    ensure(read.whole, || "Ready, and its check does not fit".into())?;
    ensure(fits_its_key(read), || "Ready with the fields of no block".into())?;
    let Some(block) = Block::of(&read.identity.key) else { return Err("no key".into()) };
    for (part, _) in block.parts() {
        let sum = segment.table.part_sum(slot, PartId(part));
        ensure(sum == Some(block.sum(part)), || format!("Ready with {sum:?} for part {part}"))?;
    }
    Ok(())
}

/// Whether all fields are those of the block that the key names.
fn fits_its_key(read: &Record) -> bool {
    Block::of(&read.identity.key).is_some_and(|block| {
        let identity = &read.identity;
        (identity.namespace.0, identity.group.0) == (block.namespace, 0)
            && u64::from(identity.position) == block.position
            && identity.parent.is_some() == (block.position > 0)
            && u64::from(identity.bytes) == layout(block.namespace).bytes
    })
}

fn check_recovered(segment: &Arc<SegmentFile>, arena: &Mapping, left: &mut Left) -> Check {
    let table = SegmentTable::new(segment.table.clone());
    let (Recovery { mut store, report, .. }, _) = recovered(segment, table);
    store.validate()?;
    let mut hits = 0;
    let namespaces = 0..SPECS.len() as u16;
    for (namespace, chain) in namespaces.flat_map(|namespace| (0..CHAINS).map(move |chain| (namespace, chain))) {
        // Before the first life has opened them there is nothing to look up.
        if let Some(found) = look_up(&mut store, segment, arena, namespace, chain)? {
            hits += found;
        }
    }
    store.validate()?;
    (left.kept, left.quarantined) = (report.kept, report.quarantined);
    let ready = store.stats().blocks_ready;
    ensure(hits == report.kept && ready == hits, || format!("{hits} hits of {ready} Ready blocks, {report:?}"))
}

/// Looks a chain up, and compares all that is hit with what it must be; how many blocks.
fn look_up(
    store: &mut BlockStore<SegmentTable>,
    segment: &SegmentFile,
    arena: &Mapping,
    namespace: u16,
    chain: u64,
) -> Result<Option<u64>, String> {
    let blocks = Block::chain(namespace, chain, LONGEST);
    let Ok(mut cursor) = store.lookup_begin(ENGINE, NamespaceId(namespace), now(segment)) else { return Ok(None) };
    store.lookup_step(&mut cursor, &blocks.iter().map(|block| block.key()).collect::<Vec<_>>());
    let reply = store.lookup_finish(cursor);
    let slots = reply.groups.first().map_or(&[][..], |group| &group.slots);
    for (block, (slot, word)) in blocks.iter().zip(slots) {
        let record = segment.table.record(*slot).unwrap().read();
        ensure(record.word == *word && record.identity.key == block.key(), || format!("{slot:?} is not {block:?}"))?;
        check_bytes(segment, arena, *slot, *block)?;
    }
    reply.lease.map(|lease| store.release(ENGINE, lease));
    Ok(Some(slots.len() as u64))
}

fn check_bytes(segment: &SegmentFile, arena: &Mapping, slot: SlotId, block: Block) -> Check {
    let at = segment.table.layout().slot_in_arena(slot, layout(block.namespace).pages).unwrap();
    for (part, place) in block.parts() {
        let mut bytes = vec![0; place.bytes as usize];
        arena.read(at + place.offset, &mut bytes);
        ensure(bytes == block.bytes(part), || format!("{slot:?} part {part} has not the bytes of {block:?}"))?;
    }
    Ok(())
}
