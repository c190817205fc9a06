//! A server with blocks in it, and engines that use it without a pause.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::attached::Attached;
use crate::served::{House, Served};
use crate::support::{chain, spec, until};

/// A server with 50 blocks in it, the chain 1.
pub fn filled(house: &House, more: &[&str]) -> (Served, Attached) {
    let served = house.start(more);
    let engine = Attached::new(&house.endpoint(), &spec("m", &[9000]), None).unwrap();
    until("the arena is backed", || engine.stat("backed_bytes") == 16 << 20);
    assert_eq!(engine.store(&chain(1, 50)).unwrap(), 50);
    (served, engine)
}

/// An engine that stores and hits all the time, and attaches again whenever it has lost its server.
pub struct Load<'a> {
    endpoint: String,
    over: &'a AtomicBool,
    rounds: AtomicUsize,
    attaches: AtomicUsize,
}

impl<'a> Load<'a> {
    pub fn new(house: &House, over: &'a AtomicBool) -> Self {
        Self { endpoint: house.endpoint(), over, rounds: 0.into(), attaches: 0.into() }
    }

    /// Until it is over: every round hits all of the chain 1, by its old bytes, in the mapping of before.
    pub fn run(&self, seed: u8) {
        let mut engine = Attached::new(&self.endpoint, &spec("m", &[9000]), None).unwrap();
        let (mapping, segment) = (engine.mapping(), engine.scheduler.segment_id().to_owned());
        while !self.over.load(Ordering::Relaxed) {
            let round = self.rounds.fetch_add(1, Ordering::Relaxed);
            let done = engine.hit(&chain(1, 50)).and_then(|hits| {
                assert_eq!(hits, 50, "the old blocks are hit, before and after");
                engine.store(&chain(seed + (round % 20) as u8, 5))
            });
            if done.is_err() {
                until("the loss is seen", || engine.scheduler.lost().is_some());
                engine = engine.again(&self.endpoint);
                self.attaches.fetch_add(1, Ordering::Relaxed);
                assert_eq!((engine.mapping(), engine.scheduler.segment_id()), (mapping, segment.as_str()));
            }
        }
    }

    /// How often it has attached again.
    pub fn attaches(&self) -> usize {
        self.attaches.load(Ordering::Relaxed)
    }
}

/// Waits until each has begun so many rounds more.
pub fn more_rounds(loads: &[Load<'_>], n: usize) {
    let begun = |load: &Load<'_>| load.rounds.load(Ordering::Relaxed);
    let before: Vec<usize> = loads.iter().map(begun).collect();
    until("the engines go on", || loads.iter().zip(&before).all(|(load, before)| begun(load) >= before + n));
}
