//! Each rule of the life of a block, one test a rule.

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::Geometry;
use kvmp_core::ids::{BlockKey, ChunkId, EngineToken, GroupId, NamespaceId, PartId, SlotId};
use kvmp_core::namespace::GroupRule;
use kvmp_core::policy::{EvictionPolicy, Lru, PolicyFactory, Victim};
use kvmp_core::slot::{PartSum, SlotState, SlotWord};
use kvmp_core::store::{
    BlockStore, ChunkState, HeapTable, ReserveAnswer, SlotTable, StoreConfig, StoreError, TooFewVictims,
};

use crate::fixture::*;

type Store = BlockStore<HeapTable>;

/// An LRU that admits nothing.
struct Picky(Lru);

impl EvictionPolicy for Picky {
    fn name(&self) -> &'static str {
        "picky"
    }
    fn add_chunk(&mut self, chunk: ChunkId, slots: u32) {
        self.0.add_chunk(chunk, slots);
    }
    fn remove_chunk(&mut self, chunk: ChunkId) {
        self.0.remove_chunk(chunk);
    }
    fn insert(&mut self, slot: SlotId, now: Ticks) {
        self.0.insert(slot, now);
    }
    fn touch(&mut self, slot: SlotId, now: Ticks) {
        self.0.touch(slot, now);
    }
    fn remove(&mut self, slot: SlotId, heir: Option<SlotId>) {
        self.0.remove(slot, heir);
    }
    fn evictable(&mut self, slot: SlotId) {
        self.0.evictable(slot);
    }
    fn coldest(&mut self, evictable: &dyn Fn(SlotId) -> bool) -> Option<Victim> {
        self.0.coldest(evictable)
    }
    fn admits(&mut self, _: Ticks) -> bool {
        false
    }
    fn validate(&self, tracked: &[SlotId], evictable: &dyn Fn(SlotId) -> bool) -> Result<(), String> {
        self.0.validate(tracked, evictable)
    }
}

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

#[test]
fn a_distrusted_block_goes_with_all_that_hangs_on_it_whoever_pins_it() {
    let mut s = store(1, 1, 1);
    assert_eq!(s.fill(None, 0, &keys(0..5), at(0)), "GGGGG");
    let hit = s.lookup(&keys(0..5), at(1));
    let (slot, word) = hit.groups[0].slots[2];
    let (reply, answers) = s.reserve_as(ENGINE, Some(4), 5, &keys(5..7), at(1));
    assert_eq!(letters(&answers), "GG");
    assert!(!s.distrust(slot, SlotWord(word.0 + (1 << 16))));
    assert!(s.distrust(slot, word));
    assert!(!s.distrust(slot, word));
    s.validate().unwrap();
    assert_eq!(s.hit(&keys(0..5), at(2)), 32);
    let stats = s.stats();
    assert_eq!((stats.distrusted_blocks, stats.blocks_ready, stats.blocks_quarantined), (1, 2, 2));
    // What was being written behind it never becomes visible, and its slots come back.
    assert_eq!(s.commit_part(reply.lease.unwrap(), 0, &granted(&answers)).ready, 0);
    assert_eq!((s.stats().blocks_quarantined, s.stats().write_leases), (0, 0));
    s.release(ENGINE, hit.lease.unwrap());
    s.validate().unwrap();
    assert_eq!(s.fill(Some(1), 2, &keys(2..7), at(3)), "GGGGG");
    s.validate().unwrap();
}

#[test]
fn answers_have_stable_codes() {
    use ReserveAnswer::*;
    let granted = Granted(SlotId(0), SlotWord(0));
    let all = [granted, Present, Pending, NoParent, NoSpace, NotAdmitted, Warming];
    assert_eq!(all.map(ReserveAnswer::code), [0, 1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_block_without_its_predecessor_has_no_parent() {
    let mut s = store(1, 1, 1);
    assert_eq!(letters(&s.reserve_as(ENGINE, Some(4), 5, &keys(5..8), at(0)).1), "nnn");
    assert_eq!(s.fill(None, 0, &keys(0..5), at(0)), "GGGGG");
    // Position and predecessor must be those of the chain.
    assert_eq!(letters(&s.reserve_as(ENGINE, Some(3), 5, &keys(5..8), at(0)).1), "nnn");
    assert_eq!(letters(&s.reserve_as(ENGINE, Some(4), 5, &keys(5..8), at(0)).1), "GGG");
    assert_eq!(letters(&s.reserve_as(ENGINE, Some(0), 1, &keys(2..4), at(0)).1), "nn");
    assert!(matches!(s.reserve_begin(ENGINE, NS, G0, None, 3, at(0)), Err(StoreError::Parent { .. })));
    s.validate().unwrap();
}

#[test]
fn a_partial_grant_is_a_prefix() {
    let mut s = store(2, 1, 128);
    assert_eq!(s.fill(None, 0, &keys(0..3), at(0)), "GGG");
    let pinned = s.lookup(&keys(0..3), at(1)).lease.unwrap();
    // 8 slots; an engine may write half of the arena.
    assert_eq!(letters(&s.reserve_as(OTHER, Some(2), 3, &keys(3..9), at(1)).1), "GGGGsn");
    assert_eq!(letters(&s.reserve_as(EngineToken(3), None, 0, &keys(20..23), at(1)).1), "Gsn");
    assert_eq!(s.stats().evictions, 0);
    s.validate().unwrap();
    assert!(s.release(ENGINE, pinned));
}

#[test]
fn an_engine_over_its_cap_of_pins_hits_without_a_pin() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..3), at(0));
    let first = s.lookup(&keys(0..3), at(0));
    let second = s.lookup(&keys(0..3), at(0));
    assert_eq!((first.tokens, second.tokens), (48, 48));
    assert!(first.lease.is_some() && second.lease.is_none());
    assert!(s.lookup_as(OTHER, &keys(0..3), at(0)).lease.is_some());
    s.validate().unwrap();
}

#[test]
fn a_read_lease_ends_by_its_ttl_and_its_id_does_not_return() {
    let mut s = store(1, 1, 128);
    s.fill(None, 0, &keys(0..2), at(0));
    let old = s.lookup(&keys(0..2), at(0)).lease.unwrap();
    assert_eq!((s.expire(at(59)), s.stats().pins), (0, 1));
    assert_eq!((s.expire(at(60)), s.stats().pins), (1, 0));
    assert!(!s.release(ENGINE, old));
    assert_ne!(s.lookup(&keys(0..2), at(61)).lease, Some(old));
    assert_eq!(s.stats().refused_releases, 1);
    s.validate().unwrap();
}

#[test]
fn a_lease_is_released_by_its_own_engine_only() {
    let mut s = store(1, 1, 1);
    s.fill(None, 0, &keys(0..2), at(0));
    let lease = s.lookup(&keys(0..2), at(0)).lease.unwrap();
    assert!(!s.release(OTHER, lease));
    assert!(s.release(ENGINE, lease));
    assert!(!s.release(ENGINE, lease));
}

#[test]
fn a_pin_on_the_tip_protects_the_run() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..4), at(0));
    let lease = s.lookup(&keys(0..4), at(1)).lease.unwrap();
    for round in 0..5 {
        assert_eq!(s.fill(None, 0, &keys(100 * round + 50..100 * round + 54), at(2 + round)), "GGGG");
        s.validate().unwrap();
    }
    s.release(ENGINE, lease);
    assert_eq!(s.hit(&keys(0..4), at(9)), 64);
}

#[test]
fn a_lookup_is_safe_between_its_slices() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..4), at(0));
    let mut cursor = s.lookup_begin(ENGINE, NS, at(1)).unwrap();
    assert!(s.lookup_step(&mut cursor, &keys(0..2)));
    for round in 1..4 {
        s.fill(None, 0, &keys(100 * round..100 * round + 4), at(1));
    }
    s.lookup_step(&mut cursor, &keys(2..4));
    s.validate().unwrap();
    // The first slice was pinned, the rest went meanwhile.
    let reply = s.lookup_finish(cursor);
    assert_eq!(reply.tokens, 32);
    assert!(s.release(ENGINE, reply.lease.unwrap()));
}

#[test]
fn a_lookup_whose_pins_were_dropped_and_run_evicted_hits_nothing() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..4), at(0));
    let mut cursor = s.lookup_begin(ENGINE, NS, at(1)).unwrap();
    s.lookup_step(&mut cursor, &keys(0..2));
    s.reads_gone(ENGINE);
    s.clear(None);
    s.fill(None, 0, &keys(0..4), at(0));
    assert!(!s.lookup_step(&mut cursor, &keys(2..4)));
    let reply = s.lookup_finish(cursor);
    assert_eq!((reply.tokens, reply.lease), (0, None));
    s.validate().unwrap();
}

#[test]
fn an_abandoned_lookup_leaves_no_pin() {
    let mut s = store(1, 1, 1);
    s.fill(None, 0, &keys(0..4), at(0));
    let mut cursor = s.lookup_begin(ENGINE, NS, at(1)).unwrap();
    s.lookup_step(&mut cursor, &keys(0..2));
    assert_eq!(s.stats().pins, 1);
    s.lookup_abandon(cursor);
    assert_eq!((s.stats().pins, s.stats().read_leases), (0, 0));
    s.validate().unwrap();
}

#[test]
fn a_reservation_keeps_what_it_extends_between_its_slices() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..2), at(0));
    let mut cursor = s.reserve_begin(ENGINE, NS, G0, Some(key(1)), 2, at(1)).unwrap();
    for round in 1..4 {
        s.fill(None, 0, &keys(100 * round..100 * round + 4), at(1));
    }
    let mut answers = Vec::new();
    s.reserve_step(&mut cursor, &keys(2..4), &mut answers);
    assert_eq!(letters(&answers), "GG");
    s.validate().unwrap();
    let reply = s.reserve_finish(cursor);
    s.commit_part(reply.lease.unwrap(), 0, &granted(&answers));
    assert_eq!(s.hit(&keys(0..4), at(2)), 64);
    assert_eq!(s.stats().pins, 0);
}

#[test]
fn a_reservation_whose_engine_goes_between_slices_gets_nothing_more() {
    let mut s = store(2, 1, 128);
    let mut cursor = s.reserve_begin(ENGINE, NS, G0, None, 0, at(1)).unwrap();
    let mut answers = Vec::new();
    s.reserve_step(&mut cursor, &keys(0..2), &mut answers);
    s.engine_gone(ENGINE);
    s.reserve_step(&mut cursor, &keys(2..4), &mut answers);
    assert_eq!(letters(&answers), "GGnn");
    s.reserve_finish(cursor);
    s.validate().unwrap();
    assert_eq!(s.stats().blocks_writing + s.stats().blocks_quarantined, 0);
    assert_eq!(s.stats().write_leases, 0);
}

#[test]
fn an_aborted_block_is_quarantined_until_every_part_is_closed() {
    let mut s = store(1, 2, 1);
    let (reply, answers) = s.reserve(&keys(0..3), at(0));
    let (lease, slots) = (reply.lease.unwrap(), granted(&answers));
    // The middle one goes, and with it what hangs on it: the Ready last block does not stay behind.
    s.commit_part(lease, 0, &slots[2..]);
    s.commit_part(lease, 1, &slots[2..]);
    assert_eq!(s.abort(ENGINE, lease, PartId(0), &slots[1..2]).aborted, 1);
    s.validate().unwrap();
    let stats = s.stats();
    assert_eq!((stats.blocks_writing, stats.blocks_quarantined, stats.blocks_ready), (1, 1, 0));
    assert_eq!(s.table().word(slots[1].0), slots[1].1);
    assert_eq!(s.table().word(slots[2].0).state(), Ok(SlotState::Free));
    assert_eq!(s.commit_part(lease, 1, &slots[1..2]).ready, 0);
    assert_eq!(s.table().word(slots[1].0).state(), Ok(SlotState::Free));
    assert_eq!(s.stats().blocks_quarantined, 0);
    s.validate().unwrap();
}

#[test]
fn another_engines_writing_descendants_end_quarantined() {
    let mut s = store(1, 1, 1);
    let (reply, answers) = s.reserve(&keys(0..2), at(0));
    let (theirs, below) = s.reserve_as(OTHER, Some(1), 2, &keys(2..4), at(0));
    s.abort(ENGINE, reply.lease.unwrap(), PartId(0), &granted(&answers)[..1]);
    s.validate().unwrap();
    let stats = s.stats();
    assert_eq!((stats.blocks_writing, stats.blocks_quarantined), (0, 3));
    let slots: Vec<_> = granted(&below).iter().map(|(s, w)| (*s, *w, PartSum::default())).collect();
    let done = s.commit(OTHER, theirs.lease.unwrap(), PartId(0), &slots);
    assert_eq!((done.committed, done.ready), (2, 0));
    s.validate().unwrap();
    assert_eq!(s.hit(&keys(0..4), at(0)), 0);
}

#[test]
fn a_ready_block_that_is_being_extended_goes_with_the_writing_one_before_it() {
    let mut s = store(1, 1, 1);
    let (reply, answers) = s.reserve(&keys(0..2), at(0));
    let (lease, slots) = (reply.lease.unwrap(), granted(&answers));
    s.commit_part(lease, 0, &slots[1..]);
    let mut cursor = s.reserve_begin(OTHER, NS, G0, Some(key(1)), 2, at(0)).unwrap();
    s.abort(ENGINE, lease, PartId(0), &slots[..1]);
    s.validate().unwrap();
    let mut out = Vec::new();
    s.reserve_step(&mut cursor, &keys(2..4), &mut out);
    assert_eq!(letters(&out), "nn");
    s.reserve_finish(cursor);
    s.validate().unwrap();
    assert_eq!((s.stats().pins, s.stats().blocks_ready), (0, 0));
}

#[test]
fn a_cancel_closes_every_part_and_a_dead_writer_its_own() {
    let mut s = store(1, 2, 1);
    let first = s.reserve(&keys(0..2), at(0)).0.lease.unwrap();
    assert!(!s.cancel(OTHER, first));
    assert!(s.cancel(ENGINE, first) && !s.cancel(ENGINE, first));
    assert_eq!(s.stats().write_leases, 0);
    let (reply, answers) = s.reserve(&keys(0..2), at(0));
    s.part_writer_gone(ENGINE, PartId(1));
    assert_eq!(s.stats().blocks_quarantined, 2);
    s.validate().unwrap();
    s.commit_part(reply.lease.unwrap(), 0, &granted(&answers));
    assert_eq!(s.stats().blocks_quarantined, 0);
    s.validate().unwrap();
}

#[test]
fn a_growing_arena_says_warming_and_a_full_one_no_space() {
    let mut s = cold_store(2);
    s.add_namespace(NS, &prefix_spec(1, 256)).unwrap();
    assert_eq!(letters(&s.reserve(&keys(0..2), at(0)).1), "wn");
    s.chunk_backed(ChunkId(1));
    assert_eq!(s.fill(None, 0, &keys(0..2), at(0)), "GG");
    assert_eq!(s.fill(Some(1), 2, &keys(2..4), at(0)), "wn");
    assert!(s.stats().warming);
    s.backing_ended();
    assert_eq!(s.fill(None, 0, &keys(10..11), at(1)), "G");
    assert_eq!((s.stats().evictions, s.stats().warming), (1, false));
    s.validate().unwrap();
}

#[test]
fn a_slot_larger_than_a_chunk_is_refused_with_the_mend() {
    let mut s = cold_store(1);
    let error = s.add_namespace(NS, &prefix_spec(1, 700)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a block of group 0 takes 2867200 bytes, more than a chunk of 2097152; start the server with --chunk 4194304 and a --size of at least as much"
    );
    assert_eq!(s.lookup_begin(ENGINE, NS, at(0)).err(), Some(StoreError::NoNamespace(NS)));
}

#[test]
fn a_namespace_goes_when_it_has_no_slot() {
    let mut s = store(1, 1, 1);
    s.fill(None, 0, &keys(0..2), at(0));
    assert_eq!(s.slots_of(NS), 2);
    assert_eq!(s.remove_namespace(NS), Err(StoreError::NamespaceInUse { namespace: NS, slots: 2 }));
    assert_eq!(s.clear(Some(NS)), 2);
    s.remove_namespace(NS).unwrap();
    assert_eq!(s.stats().namespaces, 0);
    s.validate().unwrap();
}

#[test]
fn eviction_by_number_is_all_or_nothing() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..3), at(0));
    let hit = s.lookup(&keys(0..1), at(0));
    assert_eq!(s.evict(128, 3), Err(TooFewVictims { asked: 3, found: 2 }));
    assert_eq!(s.stats().blocks_ready, 3);
    assert_eq!(s.evict(128, 2), Ok(()));
    assert_eq!(s.evict(7, 1), Err(TooFewVictims { asked: 1, found: 0 }));
    assert_eq!(s.stats().blocks_ready, 1);
    s.release(ENGINE, hit.lease.unwrap());
    s.validate().unwrap();
}

#[test]
fn a_slot_size_without_a_chunk_takes_the_coldest_and_gives_it_back_to_who_is_hotter() {
    let other = NamespaceId(1);
    let mut s = store(2, 1, 128);
    s.add_namespace(other, &prefix_spec(1, 512)).unwrap();
    s.fill(None, 0, &keys(0..4), at(1));
    s.fill(None, 0, &keys(10..14), at(2));
    let mut cursor = s.reserve_begin(OTHER, other, G0, None, 0, at(3)).unwrap();
    let mut answers = Vec::new();
    s.reserve_step(&mut cursor, &keys(0..1), &mut answers);
    let lease = s.reserve_finish(cursor).lease.unwrap();
    assert_eq!(letters(&answers), "G");
    assert_eq!((s.hit(&keys(0..4), at(4)), s.hit(&keys(10..14), at(4))), (0, 64));
    let slots: Vec<_> = granted(&answers).iter().map(|(s, w)| (*s, *w, PartSum::default())).collect();
    s.commit(OTHER, lease, PartId(0), &slots);
    s.validate().unwrap();
    // Its own coldest block was used at 4, the other's only chunk at 3.
    assert_eq!(s.fill(None, 0, &keys(20..24), at(5)), "GGGG");
    assert_eq!(s.stats().chunk_moves, 2);
    assert_eq!(s.hit(&keys(10..14), at(6)), 64);
    s.validate().unwrap();
}

#[test]
fn a_draining_chunk_waits_for_pins() {
    let other = NamespaceId(1);
    let mut s = store(1, 1, 128);
    s.add_namespace(other, &prefix_spec(1, 64)).unwrap();
    s.fill(None, 0, &keys(0..2), at(1));
    let lease = s.lookup(&keys(0..2), at(1)).lease.unwrap();
    let ask = |s: &mut Store| {
        let mut cursor = s.reserve_begin(OTHER, other, G0, None, 0, at(3)).unwrap();
        let mut answers = Vec::new();
        s.reserve_step(&mut cursor, &keys(0..1), &mut answers);
        s.reserve_finish(cursor);
        s.validate().unwrap();
        letters(&answers)
    };
    assert_eq!(ask(&mut s), "s");
    assert_eq!(s.table().chunk(ChunkId(0)), Some(ChunkState::Draining { pages: 128 }));
    assert_eq!(s.hit(&keys(0..2), at(2)), 32);
    s.release(ENGINE, lease);
    assert_eq!(ask(&mut s), "G");
    assert_eq!(s.table().chunk(ChunkId(0)), Some(ChunkState::Assigned { pages: 64 }));
}

#[test]
fn a_hit_satisfies_every_group() {
    let groups = vec![group(GroupRule::Prefix, 0, 1), group(GroupRule::Window, 32, 1), group(GroupRule::State, 0, 2)];
    let ns = NamespaceId(1);
    let mut s = store(1, 1, 1);
    s.add_namespace(ns, &spec(groups, 1, 1)).unwrap();
    let put = |s: &mut Store, g: u16, first: u32, keys: &[BlockKey]| {
        let mut cursor = s.reserve_begin(ENGINE, ns, GroupId(g), None, first, at(0)).unwrap();
        let mut answers = Vec::new();
        s.reserve_step(&mut cursor, keys, &mut answers);
        let slots = granted(&answers);
        let lease = s.reserve_finish(cursor).lease.unwrap();
        s.commit_part(lease, 0, &slots);
    };
    put(&mut s, 0, 0, &keys(0..8));
    // Of the window's group all but block 5; of the states those that end at hashes 4 and 8.
    put(&mut s, 1, 0, &[keys(0..5), keys(6..8)].concat());
    put(&mut s, 2, 1, &[key(3)]);
    put(&mut s, 2, 3, &[key(7)]);
    let look = |s: &mut Store, keys: &[BlockKey], slice: usize| {
        let mut cursor = s.lookup_begin(ENGINE, ns, at(1)).unwrap();
        keys.chunks(slice).for_each(|keys| {
            s.lookup_step(&mut cursor, keys);
        });
        s.lookup_finish(cursor)
    };
    for slice in [1, 3, 8] {
        let full = look(&mut s, &keys(0..8), slice);
        assert_eq!(full.tokens, 8 * 16);
        assert_eq!(full.groups.iter().map(|g| g.first_block).collect::<Vec<_>>(), [0, 6, 3]);
        assert_eq!(full.groups.iter().map(|g| g.slots.len()).collect::<Vec<_>>(), [8, 2, 1]);
        // With 7 hashes the state at 6 is missing, and the window at 6 misses block 5.
        assert_eq!(look(&mut s, &keys(0..7), slice).tokens, 4 * 16);
        assert_eq!(look(&mut s, &keys(0..3), slice).tokens, 0);
        s.validate().unwrap();
        s.reads_gone(ENGINE);
    }
}

#[test]
fn a_commit_stores_the_sums_of_all_parts() {
    let mut s = store(1, 2, 1);
    let (reply, answers) = s.reserve(&keys(0..1), at(0));
    let (slot, word) = granted(&answers)[0];
    let sum = |n: u32| PartSum { xxh3: u64::from(n), length: n, flags: PartSum::HAS_SUM };
    for part in [1, 0] {
        s.commit(ENGINE, reply.lease.unwrap(), PartId(part), &[(slot, word, sum(10 + u32::from(part)))]);
    }
    let record = s.table().records(ChunkId(0)).next().unwrap().1.clone();
    assert_eq!(record.sums, [sum(10), sum(11)]);
    assert_eq!(record.word, word.with_state(SlotState::Ready));
}

#[test]
fn a_policy_may_turn_a_block_away() {
    let geometry = Geometry::new(2 << 20, None).unwrap();
    let make: PolicyFactory = |geometry| Box::new(Picky(Lru::new(geometry)));
    let mut s = BlockStore::new(StoreConfig::new(geometry), HeapTable::new(geometry), make);
    s.chunk_backed(ChunkId(0));
    s.add_namespace(NS, &prefix_spec(1, 1)).unwrap();
    assert_eq!(letters(&s.reserve(&keys(0..3), at(0)).1), "ann");
    s.validate().unwrap();
}

#[test]
fn a_pin_behind_a_block_that_is_aborted_goes_with_its_block() {
    let mut s = store(1, 1, 1);
    let (parent, answers) = s.reserve(&keys(0..1), at(0));
    assert_eq!(s.fill(Some(0), 1, &keys(1..2), at(0)), "G", "the child is Ready before its parent");
    let mut cursor = s.lookup_begin(OTHER, NS, at(0)).unwrap().going_on_at(1);
    s.lookup_step(&mut cursor, &keys(1..2));
    let reply = s.lookup_finish(cursor);
    assert!(reply.lease.is_some() && s.stats().pins == 1);
    assert_eq!(s.abort(ENGINE, parent.lease.unwrap(), PartId(0), &granted(&answers)).aborted, 1);
    assert_eq!((s.stats().pins, s.stats().blocks_ready), (0, 0));
    s.validate().unwrap();
    assert!(s.release(OTHER, reply.lease.unwrap()));
    s.validate().unwrap();
}

#[test]
fn a_clear_in_slices_leaves_what_is_pinned() {
    let mut s = store(40, 1, 1);
    for chain in 0..40 {
        s.fill(None, 0, &keys(chain * 1000..chain * 1000 + 500), at(0));
    }
    let held = s.lookup(&keys(0..10), at(0));
    let mut cursor = kvmp_core::store::ClearCursor::new(None);
    let mut slices = 1;
    while s.clear_step(&mut cursor) {
        s.validate().unwrap();
        slices += 1;
    }
    assert!(slices > 1 && cursor.cleared == 40 * 500 - 10, "{slices} slices, {}", cursor.cleared);
    assert_eq!((s.stats().cleared, s.stats().evictions, s.stats().blocks_ready), (40 * 500 - 10, 0, 10));
    assert!(s.release(ENGINE, held.lease.unwrap()));
}
