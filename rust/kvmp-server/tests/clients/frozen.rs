//! A worker stopped in mid-store for longer than every bound, over a restart of the server too, and then continued.

use std::collections::BTreeSet;

use rustix::process::Signal;

use crate::puppet::{Answer, Ask};
use crate::support::until;
use crate::theatre::{Cast, Theatre};

#[test]
fn a_frozen_worker_keeps_its_slots_and_its_bytes_land_nowhere_else() {
    let mut theatre = Theatre::open("frozen");
    let mut cast = Cast::new(&theatre);
    let grant = cast.store_in_part(10);
    cast.copy(&theatre, &grant);
    let slots: BTreeSet<u32> = grant.of(4..12).slots().into_iter().collect();
    cast.workers[1].freeze();
    cast.scheduler.kill();
    cast.workers[0].kill();
    until("only its own part keeps them", || theatre.unsettled() == 8);
    let kept_back = |theatre: &Theatre, hit: usize| {
        theatre.grace_passes();
        theatre.goes_on();
        assert_eq!((theatre.unsettled(), theatre.hit(10, 12)), (8, hit));
        assert!(theatre.all_slots_to_be_had(&[]).is_disjoint(&slots), "slots of a frozen worker were given away");
    };
    let still = theatre.bytes_of(grant.slots[11].1, 1);
    // Blocks 0 to 3 have descendants that are being written; the next server does not know that they are theirs.
    kept_back(&theatre, 4);
    theatre.restart();
    kept_back(&theatre, 0);
    assert_eq!(theatre.bytes_of(grant.slots[11].1, 1), still, "it was frozen all the time");
    cast.workers[1].signal(Signal::CONT);
    theatre.sees_a_copy(grant.slots[11].1, 1);
    kept_back(&theatre, 0);
    theatre.sees_a_copy(grant.slots[11].1, 1);
    cast.workers[1].count(&Ask::Calm);
    assert!(matches!(cast.workers[1].ask(&Ask::Commit(grant.of(4..12))), Answer::Failed(_)));
    cast.workers[1].count(&Ask::Close);
    until("its slots come back", || theatre.unsettled() == 0);
    assert!(theatre.all_slots_to_be_had(&[]).is_superset(&slots));
}
