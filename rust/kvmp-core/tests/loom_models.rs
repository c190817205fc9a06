//! Every interleaving of queue, doorbell and word check, by loom; each model with a control that must fail.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p kvmp-core --test loom_models`.
#![cfg(loom)]

use std::sync::Arc;

use kvmp_core::ids::{BlockKey, GroupId, NamespaceId, SlotId};
use kvmp_core::ring::{Consumer, HeapQueue, Parking, Producer, QueueCells};
use kvmp_core::segment::RecordCells;
use kvmp_core::slot::{BlockIdentity, SlotWord};
use kvmp_core::sync::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

const CAPACITY: usize = 2;
const ENTRIES: u64 = 3;

/// What a consumer must never see: half an entry, an entry twice, or out of order.
fn check_order(queue: Arc<HeapQueue>) {
    let mut consumer = Consumer::new(queue);
    let mut next = 1;
    while next <= ENTRIES {
        match consumer.pop().expect("the producer keeps to the protocol") {
            Some(entry) => {
                assert_eq!(entry, [next; 8]);
                next += 1;
            }
            None => thread::yield_now(),
        }
    }
}

#[test]
fn queue_hands_over_whole_entries_in_order() {
    loom::model(|| {
        let queue = Arc::new(HeapQueue::new(CAPACITY));
        let filling = queue.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(filling);
            for value in 1..=ENTRIES {
                while producer.push(&[value; 8]).expect("the consumer keeps to the protocol").is_err() {
                    thread::yield_now();
                }
            }
        });
        check_order(queue);
        producer.join().unwrap();
    });
}

/// Control: the same queue with the position published before the entry is.
#[test]
#[should_panic]
fn control_queue_without_release_fails() {
    loom::model(|| {
        let queue = Arc::new(HeapQueue::new(CAPACITY));
        let filling = queue.clone();
        let producer = thread::spawn(move || {
            for (cell, value) in filling.entry(0).iter().zip([1; 8]) {
                cell.store(value, Ordering::Relaxed);
            }
            filling.tail().store(1, Ordering::Relaxed);
        });
        let mut consumer = Consumer::new(queue);
        if let Some(entry) = consumer.pop().expect("positions are right") {
            assert_eq!(entry, [1; 8]);
        }
        producer.join().unwrap();
    });
}

/// A publisher and a sleeper; `must_ring` is the publisher's look at the parked word.
fn nobody_sleeps_for_ever(must_ring: fn(&AtomicU32) -> bool) {
    loom::model(move || {
        let parked = Arc::new(AtomicU32::new(0));
        let published = Arc::new(AtomicU64::new(0));
        let (p, w) = (parked.clone(), published.clone());
        let publisher = thread::spawn(move || {
            w.store(1, Ordering::Release);
            must_ring(&p)
        });
        Parking(&parked).announce();
        let seen = published.load(Ordering::Acquire) == 1;
        let rung = publisher.join().unwrap();
        assert!(seen || rung, "the sleeper saw nothing and nobody rings: a lost wake-up");
    });
}

#[test]
fn doorbell_loses_no_wake_up() {
    nobody_sleeps_for_ever(|parked| Parking(parked).must_ring());
}

/// Control: without the publisher's SeqCst fence its look may come before its own store.
#[test]
#[should_panic(expected = "lost wake-up")]
fn control_doorbell_without_its_fence_fails() {
    nobody_sleeps_for_ever(|parked| parked.load(Ordering::Relaxed) != 0);
}

fn identity(key: u8) -> BlockIdentity {
    BlockIdentity {
        key: BlockKey([key; 32]),
        namespace: NamespaceId(0),
        group: GroupId(0),
        position: 0,
        parent: SlotId::NONE,
        bytes: 8,
    }
}

/// One slot with one word of bytes: evicted, granted anew and overwritten, while a reader copies under its old lease.
fn a_checked_copy_is_never_of_another_block(reader_fence: bool, writer_after_grant: bool) {
    loom::model(move || {
        let cells: Arc<[AtomicU64; 8]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let bytes = Arc::new(AtomicU64::new(1));
        let leased: SlotWord = {
            let record = RecordCells(&cells);
            record.grant(&identity(1));
            record.commit()
        };
        let (theirs, written) = (cells.clone(), bytes.clone());
        let writer = thread::spawn(move || {
            let record = RecordCells(&theirs);
            if !writer_after_grant {
                written.store(2, Ordering::Relaxed);
            }
            record.evict();
            record.grant(&identity(2));
            fence(Ordering::Release);
            written.store(2, Ordering::Relaxed);
        });
        let copied = bytes.load(Ordering::Relaxed);
        if reader_fence {
            fence(Ordering::Acquire);
        }
        let unchanged = cells[0].load(Ordering::Relaxed) == leased.0;
        assert!(!unchanged || copied == 1, "another block's bytes passed the check");
        writer.join().unwrap();
    });
}

#[test]
fn word_check_catches_every_overwritten_copy() {
    a_checked_copy_is_never_of_another_block(true, true);
}

/// Control: without the reader's fence the word may be read before the bytes.
#[test]
#[should_panic(expected = "passed the check")]
fn control_word_check_without_the_readers_fence_fails() {
    a_checked_copy_is_never_of_another_block(false, true);
}

/// Control: bytes written before the grant changed the word.
#[test]
#[should_panic(expected = "passed the check")]
fn control_write_before_the_grant_fails() {
    a_checked_copy_is_never_of_another_block(true, false);
}
