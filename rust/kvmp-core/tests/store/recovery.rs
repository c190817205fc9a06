//! A new store over an old table.

use kvmp_core::ids::{ChunkId, NamespaceId, PartId, SlotId};
use kvmp_core::slot::{BlockIdentity, PartSum, SlotState};
use kvmp_core::store::{BlockStore, ChunkState, HeapTable, SlotTable, StoreError};

use crate::fixture::*;

#[test]
fn what_was_ready_is_hit_again_and_what_was_written_is_held() {
    let specs = [prefix_spec(2, 64)];
    let mut s = store(2, 2, 64);
    let (reply, answers) = s.reserve(&keys(0..4), at(0));
    let (lease, slots) = (reply.lease.unwrap(), granted(&answers));
    // 0 and 1 are Ready, 2 is Writing, 3 is Ready behind it.
    for part in 0..2 {
        s.commit_part(lease, part, &[&slots[..2], &slots[3..]].concat());
    }
    let (mut s, report) = recovered(s.into_table(), &specs);
    assert_eq!((report.kept, report.evicted, report.quarantined), (2, 1, 1));
    s.validate().unwrap();
    assert_eq!(s.hit(&keys(0..4), at(1)), 32);
    assert_eq!(s.table().word(slots[2].0), slots[2].1);
    // The old writer's commit is nobody's.
    let late = (slots[2].0, slots[2].1, PartSum::default());
    assert_eq!(s.commit(ENGINE, lease, PartId(0), &[late]).refused, 1);
    // A second restart finds it again.
    let (mut s, report) = recovered(s.into_table(), &specs);
    assert_eq!((report.kept, report.quarantined), (2, 1));
    assert_eq!(s.quarantine_release(), 1);
    assert_eq!(s.table().word(slots[2].0).state(), Ok(SlotState::Free));
    s.validate().unwrap();
}

#[test]
fn generations_go_on() {
    let mut s = store(1, 1, 128);
    let (reply, answers) = s.reserve(&keys(0..1), at(0));
    let (slot, word) = granted(&answers)[0];
    s.cancel(ENGINE, reply.lease.unwrap());
    let (mut s, _) = recovered(s.into_table(), &[prefix_spec(1, 128)]);
    let again = granted(&s.reserve(&keys(0..4), at(0)).1);
    let same = again.iter().find(|(other, _)| *other == slot).unwrap_or(&again[0]);
    assert!(same.1.generation() > word.generation() || same.0 != slot);
    s.validate().unwrap();
}

#[test]
fn order_is_by_the_latest_use_of_a_block_or_what_hangs_on_it() {
    let mut s = store(2, 1, 128);
    s.fill(None, 0, &keys(0..3), at(1));
    s.fill(None, 0, &keys(10..13), at(2));
    // Only the record of the tip is touched.
    assert_eq!(s.hit(&keys(0..3), at(5)), 48);
    let (mut s, report) = recovered(s.into_table(), &[prefix_spec(1, 128)]);
    assert_eq!(report.kept, 6);
    s.evict(128, 3).unwrap();
    assert_eq!((s.hit(&keys(0..3), at(6)), s.hit(&keys(10..13), at(6))), (48, 0));
    s.validate().unwrap();
}

fn with_records(table: HeapTable, spoil: impl Fn(&mut kvmp_core::store::FoundRecord)) -> BlockStore<HeapTable> {
    let mut found = found_in(&table, ChunkId(0));
    found.iter_mut().for_each(spoil);
    let mut s = new_store(table);
    s.add_namespace(NS, &prefix_spec(1, 128)).unwrap();
    s.recover_chunk(ChunkId(0), 128, found).unwrap();
    s.recover_finish();
    s.validate().unwrap();
    s
}

#[test]
fn torn_and_stray_records_are_evicted_with_what_hangs_on_them() {
    let full = || {
        let mut s = store(1, 1, 128);
        // An engine may write half of the arena at a time.
        assert_eq!(s.fill(None, 0, &keys(0..2), at(1)), "GG");
        assert_eq!(s.fill(Some(1), 2, &keys(2..4), at(1)), "GG");
        s.into_table()
    };
    let torn = with_records(full(), |r| {
        if r.identity.is_some_and(|i| i.position == 2) {
            r.identity = None;
        }
    });
    assert_eq!((torn.stats().blocks_ready, torn.stats().slots_free), (2, 2));
    let unknown = with_records(full(), |r| {
        if let Some(identity) = &mut r.identity {
            identity.namespace.0 = 7;
        }
    });
    assert_eq!(unknown.stats().blocks_ready, 0);
    let misplaced = with_records(full(), |r| {
        if let Some(identity) = r.identity.as_mut().filter(|i| i.position == 3) {
            identity.position = 2;
        }
    });
    assert_eq!(misplaced.stats().blocks_ready, 3);
}

/// A table with one chunk of four slots and these Ready blocks: (slot, key, position, parent's slot).
fn laid(blocks: &[(u32, u64, u32, Option<u32>)]) -> HeapTable {
    let mut table = cold_store(1).into_table();
    table.set_chunk(ChunkId(0), ChunkState::Assigned { pages: 128 });
    for &(slot, n, position, parent) in blocks {
        let parent = parent.map_or(SlotId::NONE, SlotId);
        table.grant(SlotId(slot), &BlockIdentity { key: key(n), namespace: NS, group: G0, position, parent, bytes: 1 });
        table.commit(SlotId(slot), &[]);
    }
    table
}

#[test]
fn a_chain_is_kept_in_whatever_slots_it_lies() {
    for slots in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let [a, b, c, d] = slots;
        let table = laid(&[(a, 0, 0, None), (b, 1, 1, Some(a)), (c, 2, 2, Some(b)), (d, 3, 3, Some(c))]);
        let (mut s, report) = recovered(table, &[prefix_spec(1, 128)]);
        assert_eq!((report.kept, report.evicted), (4, 0));
        s.validate().unwrap();
        // Only two: an engine may pin half of the arena, and a hit over that is answered without a pin.
        assert_eq!(s.hit(&keys(0..2), at(1)), 32);
    }
}

#[test]
fn all_that_hangs_on_a_block_without_its_parent_goes() {
    // A fork behind the loose block 1, in slots before and after it; 0 is there, but is not its parent.
    let table = laid(&[(1, 1, 1, Some(9)), (0, 2, 2, Some(1)), (3, 12, 2, Some(1)), (2, 0, 0, None)]);
    let (mut s, report) = recovered(table, &[prefix_spec(1, 128)]);
    assert_eq!((report.kept, report.evicted, s.stats().slots_free), (1, 3, 3));
    s.validate().unwrap();
    assert_eq!(s.fill(Some(0), 1, &keys(1..3), at(1)), "GG");
    s.validate().unwrap();
}

#[test]
fn a_block_of_another_namespace_is_no_parent() {
    let mut table = laid(&[(1, 1, 1, Some(0))]);
    let parent = SlotId::NONE;
    let head = BlockIdentity { key: key(0), namespace: NamespaceId(1), group: G0, position: 0, parent, bytes: 1 };
    table.grant(SlotId(0), &head);
    table.commit(SlotId(0), &[]);
    let (s, report) = recovered(table, &[prefix_spec(1, 128), prefix_spec(1, 128)]);
    s.validate().unwrap();
    assert_eq!((report.kept, report.evicted, s.slots_of(NamespaceId(1))), (1, 1, 1));
}

#[test]
fn of_two_blocks_with_one_identity_one_stays() {
    let table = laid(&[(0, 5, 0, None), (1, 6, 1, Some(0)), (2, 5, 0, None), (3, 7, 1, Some(2))]);
    let (s, report) = recovered(table, &[prefix_spec(1, 128)]);
    s.validate().unwrap();
    // Slot 2 and what hangs on it.
    assert_eq!((report.kept, report.evicted, s.stats().slots_free), (2, 2, 2));
}

#[test]
fn a_chunk_is_recovered_once_and_with_a_size_that_can_be() {
    let mut s = cold_store(1);
    let error = |r: Result<(), StoreError>| r.unwrap_err().to_string();
    assert!(error(s.recover_chunk(ChunkId(0), 0, [])).contains("slots of 0 pages"));
    assert!(error(s.recover_chunk(ChunkId(3), 1, [])).starts_with("chunk 3 "));
    s.recover_chunk(ChunkId(0), 1, []).unwrap();
    assert!(s.recover_chunk(ChunkId(0), 1, []).is_err());
}
