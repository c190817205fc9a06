//! A bounded single-producer single-consumer queue of 64-byte entries over shared atomics.

use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};

/// One entry: 64 bytes as eight words.
pub type Entry = [u64; 8];

/// Where a queue's atomics live: mapped memory, or the heap in models and tests.
pub trait QueueCells {
    /// Position of the next entry to be filled; written by the producer only.
    fn tail(&self) -> &AtomicU64;
    /// Position of the next entry to be taken; written by the consumer only.
    fn head(&self) -> &AtomicU64;
    /// The words of entry `index % capacity`.
    fn entry(&self, index: u64) -> &[AtomicU64; 8];
    /// Number of entries.
    fn capacity(&self) -> u64;
}

/// A queue on the heap: for models, tests and one-process use.
#[derive(Debug)]
pub struct HeapQueue {
    tail: AtomicU64,
    head: AtomicU64,
    entries: Vec<[AtomicU64; 8]>,
}

impl HeapQueue {
    /// A queue of `capacity` entries (at least 1).
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let entries = (0..capacity.max(1)).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect();
        Self { tail: AtomicU64::new(0), head: AtomicU64::new(0), entries }
    }
}

impl QueueCells for HeapQueue {
    fn tail(&self) -> &AtomicU64 {
        &self.tail
    }
    fn head(&self) -> &AtomicU64 {
        &self.head
    }
    fn entry(&self, index: u64) -> &[AtomicU64; 8] {
        &self.entries[(index % self.capacity()) as usize]
    }
    fn capacity(&self) -> u64 {
        self.entries.len() as u64
    }
}

impl<C: QueueCells> QueueCells for Arc<C> {
    fn tail(&self) -> &AtomicU64 {
        (**self).tail()
    }
    fn head(&self) -> &AtomicU64 {
        (**self).head()
    }
    fn entry(&self, index: u64) -> &[AtomicU64; 8] {
        (**self).entry(index)
    }
    fn capacity(&self) -> u64 {
        (**self).capacity()
    }
}

/// No entry is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct Full;

/// The other side's position makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("queue position {theirs} against {ours}: more than {capacity} apart, or going back")]
pub struct Corrupt {
    /// Position this side keeps.
    pub ours: u64,
    /// Position the other side wrote.
    pub theirs: u64,
    /// Entries in the queue.
    pub capacity: u64,
}

/// The filling side. Keeps its own position: what lies in shared memory is only published, never read back.
#[derive(Debug)]
pub struct Producer<C> {
    cells: C,
    tail: u64,
    head_seen: u64,
}

impl<C: QueueCells> Producer<C> {
    /// The producer of a fresh queue.
    pub fn new(cells: C) -> Self {
        Self { cells, tail: 0, head_seen: 0 }
    }

    /// Entries that may still be pushed, as far as known without a look at the other side.
    fn room(&self) -> u64 {
        self.cells.capacity() - (self.tail - self.head_seen)
    }

    fn refresh(&mut self) -> Result<(), Corrupt> {
        // (Q2) Pairs with the consumer's Release store of head: its reads of the entry are done before we fill it again.
        let theirs = self.cells.head().load(Ordering::Acquire);
        if theirs < self.head_seen || theirs > self.tail {
            return Err(Corrupt { ours: self.tail, theirs, capacity: self.cells.capacity() });
        }
        self.head_seen = theirs;
        Ok(())
    }

    /// Fills and publishes one entry.
    pub fn push(&mut self, entry: &Entry) -> Result<Result<(), Full>, Corrupt> {
        if self.room() == 0 {
            self.refresh()?;
            if self.room() == 0 {
                return Ok(Err(Full));
            }
        }
        for (cell, value) in self.cells.entry(self.tail).iter().zip(entry) {
            cell.store(*value, Ordering::Relaxed);
        }
        self.tail += 1;
        // (Q1) Publishes the entry; pairs with the consumer's Acquire load of tail.
        self.cells.tail().store(self.tail, Ordering::Release);
        Ok(Ok(()))
    }
}

/// The taking side.
#[derive(Debug)]
pub struct Consumer<C> {
    cells: C,
    head: u64,
    tail_seen: u64,
}

impl<C: QueueCells> Consumer<C> {
    /// The consumer of a fresh queue.
    pub fn new(cells: C) -> Self {
        Self { cells, head: 0, tail_seen: 0 }
    }

    /// Whether an entry waits; looks at the other side's position.
    pub fn is_ready(&mut self) -> Result<bool, Corrupt> {
        if self.head == self.tail_seen {
            // (Q1)
            let theirs = self.cells.tail().load(Ordering::Acquire);
            if theirs < self.tail_seen || theirs - self.head > self.cells.capacity() {
                return Err(Corrupt { ours: self.head, theirs, capacity: self.cells.capacity() });
            }
            self.tail_seen = theirs;
        }
        Ok(self.head != self.tail_seen)
    }

    /// Takes the next entry: copied once, then its place is given back.
    pub fn pop(&mut self) -> Result<Option<Entry>, Corrupt> {
        if !self.is_ready()? {
            return Ok(None);
        }
        let cells = self.cells.entry(self.head);
        let entry = std::array::from_fn(|i| cells[i].load(Ordering::Relaxed));
        self.head += 1;
        // (Q2)
        self.cells.head().store(self.head, Ordering::Release);
        Ok(Some(entry))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pair(capacity: usize) -> (Arc<HeapQueue>, Producer<Arc<HeapQueue>>, Consumer<Arc<HeapQueue>>) {
        let queue = Arc::new(HeapQueue::new(capacity));
        (queue.clone(), Producer::new(queue.clone()), Consumer::new(queue))
    }

    #[test]
    fn entries_come_out_in_order_and_full_is_said() {
        let (_, mut producer, mut consumer) = pair(4);
        for round in 0..10u64 {
            for i in 0..4 {
                assert_eq!(producer.push(&[round * 4 + i; 8]), Ok(Ok(())));
            }
            assert_eq!(producer.push(&[0; 8]), Ok(Err(Full)));
            for i in 0..4 {
                assert_eq!(consumer.pop(), Ok(Some([round * 4 + i; 8])));
            }
            assert_eq!(consumer.pop(), Ok(None));
        }
    }

    #[test]
    fn a_tail_that_jumps_is_corrupt() {
        let (queue, _producer, mut consumer) = pair(4);
        queue.tail.store(5, Ordering::Relaxed);
        assert!(matches!(consumer.pop(), Err(Corrupt { theirs: 5, .. })));
        queue.tail.store(u64::MAX, Ordering::Relaxed);
        assert!(consumer.pop().is_err());
    }

    #[test]
    fn a_tail_that_goes_back_is_corrupt() {
        let (queue, mut producer, mut consumer) = pair(4);
        producer.push(&[1; 8]).unwrap().unwrap();
        assert!(consumer.pop().unwrap().is_some());
        queue.tail.store(0, Ordering::Relaxed);
        assert!(consumer.pop().is_err());
    }

    #[test]
    fn a_head_that_lies_is_corrupt() {
        for lie in [3, u64::MAX] {
            let (queue, mut producer, _consumer) = pair(2);
            producer.push(&[1; 8]).unwrap().unwrap();
            producer.push(&[2; 8]).unwrap().unwrap();
            queue.head.store(lie, Ordering::Relaxed);
            assert!(producer.push(&[3; 8]).is_err());
        }
    }
}
