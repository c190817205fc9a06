//! A [`HeapTable`] that keeps what was done to it, and refuses what the life of a slot does not allow.

use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::slot::{BlockIdentity, PartSum, SlotState, SlotWord};
use kvmp_core::store::{ChunkState, HeapTable, SlotTable};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    Grant(SlotId),
    Ready(SlotId),
    Evict(SlotId),
}

pub struct LoggedTable {
    pub inner: HeapTable,
    pub events: std::cell::RefCell<Vec<Event>>,
}

impl LoggedTable {
    pub fn new(inner: HeapTable) -> Self {
        Self { inner, events: Default::default() }
    }

    pub fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }

    fn log(&mut self, event: Event) {
        self.events.get_mut().push(event);
    }
}

impl SlotTable for LoggedTable {
    fn grant(&mut self, slot: SlotId, identity: &BlockIdentity) -> SlotWord {
        assert_eq!(self.word(slot).state(), Ok(SlotState::Free), "{slot:?} granted");
        self.log(Event::Grant(slot));
        self.inner.grant(slot, identity)
    }

    fn commit(&mut self, slot: SlotId, sums: &[PartSum]) -> SlotWord {
        assert_eq!(self.word(slot).state(), Ok(SlotState::Writing), "{slot:?} committed");
        self.log(Event::Ready(slot));
        self.inner.commit(slot, sums)
    }

    fn evict(&mut self, slot: SlotId) {
        assert_ne!(self.word(slot).state(), Ok(SlotState::Free), "{slot:?} evicted");
        self.log(Event::Evict(slot));
        self.inner.evict(slot);
    }

    fn touch(&mut self, slot: SlotId, touched: u32) {
        self.inner.touch(slot, touched);
    }

    fn word(&self, slot: SlotId) -> SlotWord {
        self.inner.word(slot)
    }

    fn set_chunk(&mut self, chunk: ChunkId, state: ChunkState) {
        self.inner.set_chunk(chunk, state);
    }
}
