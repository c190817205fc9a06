//! A scheduler that gives requests up whose workers are copying: no slot is granted again before its parts are closed.

use std::collections::BTreeSet;

use crate::puppet::Ask;
use crate::support::until;
use crate::theatre::{Cast, Theatre};

#[test]
fn slots_of_an_aborted_request_wait_for_the_copies_into_them() {
    let theatre = Theatre::open("aborted");
    let mut cast = Cast::new(&theatre);
    let grant = cast.store_in_part(10);
    cast.copy(&theatre, &grant);
    let slots: BTreeSet<u32> = grant.of(8..12).slots().into_iter().collect();
    let kept_back = |quarantined: u64| {
        assert_eq!((theatre.stat("blocks_quarantined"), theatre.hit(10, 12)), (quarantined, 4));
        assert!(theatre.all_slots_to_be_had(&[10]).is_disjoint(&slots), "a slot was given away under a copy");
        theatre.sees_a_copy(grant.slots[11].1, 0);
    };
    assert_eq!(cast.scheduler.count(&Ask::Abandon), 1);
    kept_back(0);
    // The worker that is told first stops; the other one goes on.
    cast.workers[1].count(&Ask::Calm);
    assert_eq!(cast.workers[1].count(&Ask::Abort(grant.of(4..12))), 8);
    kept_back(4);
    // The scheduler leaves altogether.
    cast.scheduler.count(&Ask::Close);
    until("its session is gone", || theatre.stat("sessions") == 8);
    kept_back(4);
    // Hung up, and copying still.
    cast.workers[0].count(&Ask::Close);
    until("its session is gone", || theatre.stat("sessions") == 7);
    theatre.grace_passes();
    kept_back(4);
    cast.workers[0].count(&Ask::Calm);
    until("the last part is closed", || theatre.unsettled() == 0);
    assert!(theatre.all_slots_to_be_had(&[10]).is_superset(&slots));
}
