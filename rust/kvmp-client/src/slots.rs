//! From slot numbers to places of this client's part in the arena, for copies.

use kvmp_core::ids::{PartId, SlotId};
use kvmp_core::segment::{ChunkWord, Mapping, TableMap};

use crate::copy::{ArenaView, BlockLayout};
use crate::error::input;
use crate::holder::CopyGuard;
use crate::{ClientError, Namespace};

/// Where the parts of some slots lie, with all that keeps the memory there as long as the copy runs.
#[derive(Debug)]
pub struct PartsAt {
    /// Offset of the part in the arena for each slot, bytes.
    pub offsets: Vec<u64>,
    /// Bytes of the part.
    pub bytes: u64,
    /// The arena as mapped here.
    pub arena: Mapping,
    /// Keeps the holder entry locked.
    pub guard: CopyGuard,
}

/// Nothing to do, but it keeps the whole together: a closure that takes some fields of a type without it leaves the others
/// behind, and a copy moved to a thread would go on without its guard.
impl Drop for PartsAt {
    fn drop(&mut self) {}
}

impl PartsAt {
    /// The arena, for a copy.
    #[must_use]
    pub fn view(&self) -> ArenaView {
        ArenaView::new(self.arena.as_ptr(), self.arena.len())
    }

    /// Blocks and places side by side.
    ///
    /// # Errors
    /// A layout whose blocks are not of the part's size, or not a block a place.
    pub fn pairs(&self, layout: &BlockLayout, blocks: &[u32]) -> Result<Vec<(u32, u64)>, ClientError> {
        if layout.part_bytes() as u64 != self.bytes {
            let (ours, theirs) = (layout.part_bytes(), self.bytes);
            return Err(input("layout", format!("its blocks have {ours} bytes, the namespace's part has {theirs}")));
        }
        if blocks.len() != self.offsets.len() {
            return Err(input("slots", format!("{} slots for {} blocks", self.offsets.len(), blocks.len())));
        }
        Ok(blocks.iter().copied().zip(self.offsets.iter().copied()).collect())
    }
}

/// Offsets of a part in the arena; refuses slots that are not of the group's size now.
pub(crate) fn part_offsets(
    table: &TableMap,
    namespace: &Namespace,
    group: u16,
    part: u16,
    slots: &[u32],
) -> Result<(Vec<u64>, u64), ClientError> {
    let layout = namespace.slot_layout(group)?;
    let place = layout.part(PartId(part)).ok_or_else(|| {
        input("part", format!("{part} is out of range: the namespace has {}", namespace.spec().parts.len()))
    })?;
    let offsets = slots.iter().map(|&slot| slot_offset(table, SlotId(slot), layout.pages).map(|at| at + place.offset));
    Ok((offsets.collect::<Result<_, _>>()?, place.bytes))
}

fn slot_offset(table: &TableMap, slot: SlotId, pages: u32) -> Result<u64, ClientError> {
    let bad = |why: String| input("slots", format!("slot {} {why}", slot.0));
    let chunk = table.layout().geometry.chunk_of(slot).ok_or_else(|| bad("is outside the arena".into()))?;
    match table.chunk(chunk) {
        Some(ChunkWord::Assigned(size) | ChunkWord::Draining(size)) if size == pages => {}
        other => {
            return Err(bad(format!(
                "is in a chunk that holds no slots of {pages} pages ({other:?}); its lease is over"
            )));
        }
    }
    table.layout().slot_in_arena(slot, pages).ok_or_else(|| bad(format!("is no slot of {pages} pages")))
}
