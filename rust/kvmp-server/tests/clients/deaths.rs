//! Schedulers and workers that die between reserve and commit, or in mid-copy; the server too.

use std::collections::BTreeSet;

use crate::puppet::{Answer, Ask, Grant};
use crate::support::{chain, until};
use crate::theatre::{Cast, Theatre};

/// Who dies.
#[derive(Clone, Copy, PartialEq)]
enum Victims {
    Scheduler,
    Worker1,
    All,
}

/// Two engines that have stored a part of what they reserved: one is between reserve and commit, one in mid-copy.
struct Scene {
    theatre: Theatre,
    casts: Vec<Cast>,
    grants: Vec<Grant>,
}

const SEEDS: [u8; 2] = [10, 11];

impl Scene {
    fn set(name: &str) -> Self {
        let theatre = Theatre::open(name);
        theatre.bystanders[0].store(&chain(1, 20));
        let mut casts: Vec<Cast> = (0..2).map(|_| Cast::new(&theatre)).collect();
        let grants: Vec<Grant> = casts.iter_mut().zip(SEEDS).map(|(cast, seed)| cast.store_in_part(seed)).collect();
        casts[1].copy(&theatre, &grants[1]);
        for cast in &mut casts {
            assert_eq!(cast.scheduler.count(&Ask::Lookup(1, 20)), 20);
        }
        assert_eq!((theatre.stat("pins"), theatre.stat("read_leases"), theatre.stat("blocks_writing")), (2, 2, 16));
        Self { theatre, casts, grants }
    }

    fn kill(&mut self, victims: Victims) {
        for cast in &mut self.casts {
            if victims != Victims::Worker1 {
                cast.scheduler.kill();
            }
            if victims != Victims::Scheduler {
                cast.workers[1].kill();
            }
            if victims == Victims::All {
                cast.workers[0].kill();
            }
        }
    }

    fn slots(&self, blocks: std::ops::Range<usize>) -> BTreeSet<u32> {
        self.grants.iter().flat_map(|grant| grant.of(blocks.clone()).slots()).collect()
    }

    fn visible(&self, blocks: usize) {
        for seed in SEEDS {
            assert_eq!(self.theatre.hit(seed, 12), blocks);
        }
    }

    /// None of these is given away, also not when the arena is full.
    fn kept_back(&self, slots: &BTreeSet<u32>) {
        let had = self.theatre.all_slots_to_be_had(&SEEDS);
        assert!(!had.is_empty() && had.is_disjoint(slots), "slots that may still be written to were given away");
    }

    fn come_back(&self, slots: &BTreeSet<u32>) {
        assert!(self.theatre.all_slots_to_be_had(&SEEDS).is_superset(slots));
    }
}

#[test]
fn a_scheduler_that_dies_takes_its_pins_along_and_its_workers_may_finish() {
    let mut scene = Scene::set("scheduler");
    scene.kill(Victims::Scheduler);
    until("its pins are gone", || scene.theatre.stat("pins") + scene.theatre.stat("read_leases") == 0);
    scene.visible(4);
    assert_eq!(scene.theatre.stat("blocks_writing"), 16);
    scene.kept_back(&scene.slots(4..12));
    for (cast, grant) in scene.casts.iter_mut().zip(&scene.grants) {
        for worker in &mut cast.workers {
            worker.count(&Ask::Calm);
        }
        cast.workers[1].store(&grant.of(4..8));
    }
    // Every part of these was committed; of the others none was.
    scene.visible(8);
    scene.kill(Victims::All);
    until("the rest comes back", || scene.theatre.unsettled() == 0);
    scene.visible(8);
    scene.come_back(&scene.slots(8..12));
}

#[test]
fn blocks_of_a_worker_that_dies_never_become_visible() {
    let mut scene = Scene::set("worker");
    scene.kill(Victims::Worker1);
    // Of blocks 4 to 7 the other part was committed: nobody can write there any more. Of 8 to 11 it is open.
    until("what nobody writes comes back", || scene.theatre.unsettled() == 8);
    assert_eq!(scene.theatre.stat("blocks_quarantined"), 8);
    assert_eq!(scene.theatre.stat("pins"), 2, "the schedulers live");
    scene.visible(4);
    scene.come_back(&scene.slots(4..8));
    scene.kept_back(&scene.slots(8..12));
    for (cast, grant) in scene.casts.iter_mut().zip(&scene.grants) {
        cast.workers[0].count(&Ask::Calm);
        cast.workers[0].store(&grant.of(8..12));
    }
    assert_eq!(scene.theatre.unsettled(), 0);
    scene.visible(4);
    scene.come_back(&scene.slots(8..12));
}

#[test]
fn a_part_whose_worker_left_before_the_grant_closes_with_its_scheduler() {
    let theatre = Theatre::open("left");
    let mut cast = Cast::new(&theatre);
    cast.workers[0].kill();
    until("the worker is gone", || theatre.stat("sessions") == 8);
    theatre.grace_passes();
    let grant = cast.scheduler.reserve(10, 12);
    cast.workers[1].store(&grant);
    assert_eq!((theatre.unsettled(), theatre.hit(10, 12)), (12, 0));
    // The worker that lives is done with its part, and nobody may join for the other one any more.
    cast.scheduler.kill();
    until("all comes back", || theatre.unsettled() == 0);
    assert_eq!(theatre.hit(10, 12), 0);
}

#[test]
fn an_engine_that_dies_altogether_leaves_what_it_had_stored() {
    let mut scene = Scene::set("all");
    scene.kill(Victims::All);
    until("all comes back", || scene.theatre.unsettled() + scene.theatre.stat("pins") == 0);
    until("it is forgotten", || scene.theatre.stat("engines") == 2);
    scene.visible(4);
    scene.come_back(&scene.slots(4..12));
}

/// What was being written is held back, longer than the grace, as long as a process of before may still write.
fn waits_for_the_last(mut scene: Scene, victims: Victims) {
    scene.kill(victims);
    scene.theatre.grace_passes();
    assert_eq!(scene.theatre.stat("blocks_quarantined"), 16);
    scene.visible(4);
    scene.kept_back(&scene.slots(4..12));
    for (cast, grant) in scene.casts.iter_mut().zip(&scene.grants) {
        let survivor = &mut cast.workers[0];
        survivor.count(&Ask::Calm);
        assert!(matches!(survivor.ask(&Ask::Commit(grant.of(8..12))), Answer::Failed(_)), "a lease of another epoch");
        survivor.count(&Ask::Close);
    }
    for cast in &mut scene.casts {
        match victims {
            Victims::Worker1 => drop(cast.scheduler.ask(&Ask::Close)),
            _ => cast.workers[1].kill(),
        }
    }
    comes_back(&scene);
}

fn comes_back(scene: &Scene) {
    until("all comes back", || scene.theatre.unsettled() == 0);
    scene.visible(4);
    scene.come_back(&scene.slots(4..12));
}

#[test]
fn after_a_restart_slots_wait_for_the_workers_of_a_dead_scheduler() {
    let mut scene = Scene::set("restart-scheduler");
    scene.theatre.restart();
    waits_for_the_last(scene, Victims::Scheduler);
}

#[test]
fn after_a_restart_slots_of_a_dead_worker_wait_for_the_other() {
    let mut scene = Scene::set("restart-worker");
    scene.theatre.restart();
    waits_for_the_last(scene, Victims::Worker1);
}

#[test]
fn after_a_restart_slots_of_an_engine_that_died_altogether_come_back() {
    let mut scene = Scene::set("restart-all");
    // Frozen, so that it is the next server that has to find out.
    scene.theatre.server.freeze();
    scene.kill(Victims::All);
    scene.theatre.restart();
    assert_eq!(scene.theatre.stat("blocks_quarantined"), 16);
    comes_back(&scene);
}
