//! Each rule of the life of a block, one test a rule.

use kvmp_core::ids::{EngineToken, PartId};
use kvmp_core::slot::{PartSum, SlotState};

use crate::fixture::*;

#[test]
fn a_block_is_visible_when_its_last_part_is_committed() {
    let mut s = store(1, 2, 1);
    let (reply, answers) = s.reserve(&keys(0..3), at(0));
    assert_eq!(letters(&answers), "GGG");
    let (lease, slots) = (reply.lease.unwrap(), granted(&answers));
    assert_eq!(s.commit_part(lease, 0, &slots).ready, 0);
    assert_eq!(s.hit(&keys(0..3), at(0)), 0);
    assert_eq!(s.commit_part(lease, 1, &slots[..2]).ready, 2);
    assert_eq!(s.hit(&keys(0..3), at(0)), 32);
    assert_eq!(s.commit_part(lease, 1, &slots[2..]).ready, 1);
    let hit = s.lookup(&keys(0..4), at(0));
    assert_eq!(hit.tokens, 48);
    assert_eq!(hit.groups[0].slots.len(), 3);
    assert!(hit.groups[0].slots.iter().all(|(_, word)| word.state() == Ok(SlotState::Ready)));
    s.validate().unwrap();
    assert_eq!(s.stats().write_leases, 0);
}

#[test]
fn what_is_there_is_present_and_what_is_written_pending() {
    let mut s = store(1, 1, 1);
    assert_eq!(s.fill(None, 0, &keys(0..2), at(0)), "GG");
    let (reply, answers) = s.reserve(&keys(0..4), at(0));
    assert_eq!(letters(&answers), "PPGG");
    assert_eq!(reply.granted, 2);
    assert_eq!(letters(&s.reserve_as(OTHER, None, 0, &keys(0..5), at(0)).1), "PPWWG");
    s.validate().unwrap();
}

#[test]
fn duplicates_and_strangers_are_refused_and_disturb_nothing() {
    let mut s = store(1, 2, 1);
    let (reply, answers) = s.reserve(&keys(0..2), at(0));
    let (lease, slots) = (reply.lease.unwrap(), granted(&answers));
    let sums: Vec<_> = slots.iter().map(|(slot, word)| (*slot, *word, PartSum::default())).collect();
    assert_eq!(s.commit(OTHER, lease, PartId(0), &sums).refused, 2);
    assert_eq!(s.commit(ENGINE, lease, PartId(2), &sums).refused, 2);
    assert_eq!(s.commit(EngineToken(9), lease, PartId(0), &sums).refused, 2);
    assert_eq!(s.commit_part(lease, 0, &slots).committed, 2);
    assert_eq!(s.commit_part(lease, 0, &slots).refused, 2);
    assert_eq!(s.abort(ENGINE, lease, PartId(0), &slots).refused, 2);
    assert_eq!(s.commit_part(lease, 1, &slots).ready, 2);
    assert_eq!(s.commit_part(lease, 1, &slots).refused, 2);
    assert_eq!(s.hit(&keys(0..2), at(0)), 32);
    s.validate().unwrap();
}
