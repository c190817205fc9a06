//! Copies against a naive model, with guard bytes round everything; and every refusal.

mod paged_memory;

use kvmp_client::copy::{ArenaView, BlockLayout, CopyError, Run, load, store};
use paged_memory::{Case, case, model_load, model_store};
use proptest::prelude::*;

fn copy(case: &mut Case, is_store: bool) -> Result<(), CopyError> {
    let layout = BlockLayout::new(case.runs(), case.num_blocks)?;
    assert_eq!(layout.part_bytes(), case.part_bytes);
    let arena = ArenaView::new(case.arena.as_mut_ptr(), case.arena.len());
    let op = if is_store { store } else { load };
    // SAFETY: both buffers outlive the call, are apart, and only this thread knows them.
    unsafe { op(&layout, arena, &case.pairs, case.threads) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn store_writes_just_the_parts_named(mut case in case()) {
        let (memory, mut expected) = (case.memory.clone(), case.arena.clone());
        model_store(&case, &mut expected);
        copy(&mut case, true).unwrap();
        prop_assert!(case.arena == expected, "arena differs from the model");
        prop_assert!(case.memory == memory, "a store changed the engine's memory");
    }

    #[test]
    fn load_writes_just_the_blocks_named(mut case in case()) {
        let (mut expected, arena) = (case.memory.clone(), case.arena.clone());
        model_load(&case, &mut expected);
        copy(&mut case, false).unwrap();
        prop_assert!(case.memory == expected, "memory differs from the model");
        prop_assert!(case.arena == arena, "a load changed the arena");
    }

    #[test]
    fn a_refused_copy_moves_nothing(mut case in case(), is_store: bool, bad_block: bool) {
        let last = case.arena.len() as u64 - case.part_bytes as u64;
        case.pairs.push(if bad_block { (case.num_blocks, 0) } else { (0, last + 1) });
        let (memory, arena) = (case.memory.clone(), case.arena.clone());
        let refused = copy(&mut case, is_store).unwrap_err();
        let by_bound = matches!(refused, CopyError::Block { .. } | CopyError::Arena { .. });
        prop_assert!(by_bound, "{refused}");
        prop_assert!(case.memory == memory && case.arena == arena);
    }
}

/// Negative control: the comparison above sees one wrong byte.
#[test]
fn the_model_tells_one_byte() {
    let mut case = Case::dense(4, 64, &[(1, 128)]);
    let mut expected = case.arena.clone();
    model_store(&case, &mut expected);
    case.memory[paged_memory::GUARD + 64] ^= 1;
    copy(&mut case, true).unwrap();
    assert_ne!(case.arena, expected);
}

#[test]
fn large_copies_stream_and_share() {
    for threads in [None, Some(1), Some(3)] {
        let mut case = Case::dense(7, (1 << 20) + 4097, &[(6, 3), (0, 3 << 20), (2, 5 << 20)]);
        case.threads = threads;
        let mut expected = case.arena.clone();
        model_store(&case, &mut expected);
        copy(&mut case, true).unwrap();
        assert!(case.arena == expected);
        case.pairs.reverse();
        case.memory.fill(0);
        let mut expected = case.memory.clone();
        model_load(&case, &mut expected);
        copy(&mut case, false).unwrap();
        assert!(case.memory == expected);
    }
}

#[test]
fn a_copy_of_no_blocks_is_done() {
    let mut case = Case::dense(2, 64, &[]);
    assert_eq!(copy(&mut case, true), Ok(()));
    assert_eq!(copy(&mut case, false), Ok(()));
}

#[test]
fn pairs_that_race_are_refused() {
    let mut twice = Case::dense(4, 64, &[(1, 0), (2, 64), (1, 128)]);
    assert_eq!(copy(&mut twice, true), Ok(()));
    assert_eq!(copy(&mut twice, false), Err(CopyError::DuplicateBlock { block: 1 }));
    let mut same_part = Case::dense(4, 64, &[(1, 0), (2, 63)]);
    assert_eq!(copy(&mut same_part, true), Err(CopyError::PartsOverlap { first: 0, second: 63 }));
}

#[test]
fn offsets_that_wrap_and_zero_threads_are_refused() {
    let mut wraps = Case::dense(4, 64, &[(1, u64::MAX - 3)]);
    assert!(matches!(copy(&mut wraps, true), Err(CopyError::Arena { .. })));
    let mut none = Case::dense(4, 64, &[(1, 0)]);
    none.threads = Some(0);
    assert_eq!(copy(&mut none, true), Err(CopyError::NoThreads));
    assert_eq!(copy(&mut none, false), Err(CopyError::NoThreads));
}

fn run(addr: usize, block_stride: isize, len: usize, part_offset: usize) -> Run {
    Run { addr, block_stride, len, part_offset }
}

#[test]
fn runs_end_to_end_become_one() {
    // Three layers of 64 bytes side by side in a block of 256, given in any order, and one elsewhere.
    let runs = vec![
        run(4096 + 64, 256, 64, 64),
        run(9 << 20, 64, 64, 192),
        run(4096 + 128, 256, 64, 128),
        run(4096, 256, 64, 0),
    ];
    let layout = BlockLayout::new(runs, 8).unwrap();
    assert_eq!(layout.runs(), [run(4096, 256, 192, 0), run(9 << 20, 64, 64, 192)]);
    assert_eq!((layout.part_bytes(), layout.num_blocks()), (256, 8));
}

#[test]
fn heads_outside_blocks_are_no_overlap() {
    // Layout LHBNC: one stride, equal residues, spans side by side.
    let runs = (0..4).map(|head| run(4096 + head * 640, 64, 64, head * 64)).collect();
    assert_eq!(BlockLayout::new(runs, 10).unwrap().runs().len(), 4);
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let refused = |runs: &[Run], blocks| BlockLayout::new(runs.to_vec(), blocks).unwrap_err();
    assert!(matches!(refused(&[], 4), CopyError::Empty { .. }));
    assert!(matches!(refused(&[run(64, 64, 64, 0)], 0), CopyError::Empty { .. }));
    assert!(matches!(refused(&[run(64, 64, 0, 0)], 4), CopyError::Extent { .. }));
    assert!(matches!(refused(&[run(64, isize::MAX, 64, 0)], 4), CopyError::Extent { .. }));
    assert!(matches!(refused(&[run(64, -64, 64, 0)], 4), CopyError::Extent { .. }));
    assert!(matches!(refused(&[run(usize::MAX - 64, 64, 64, 0)], 4), CopyError::Extent { .. }));
    assert_eq!(refused(&[run(64, 64, 64, 8)], 4), CopyError::Tiling { expected: 0, found: 8 });
    assert_eq!(refused(&[run(64, 64, 64, 0), run(4096, 64, 64, 60)], 4), CopyError::Tiling { expected: 64, found: 60 });
    assert_eq!(refused(&[run(64, 64, 64, 0), run(4096, 64, 64, 68)], 4), CopyError::Tiling { expected: 64, found: 68 });
}

#[test]
fn memory_that_overlaps_is_refused() {
    let refused = |runs: &[Run], blocks| BlockLayout::new(runs.to_vec(), blocks).unwrap_err();
    assert!(matches!(refused(&[run(64, 0, 64, 0)], 2), CopyError::BlocksOverlap { .. }));
    assert!(matches!(refused(&[run(4096, -63, 64, 0)], 2), CopyError::BlocksOverlap { .. }));
    let two = |second: Run, blocks| refused(&[run(4096, 256, 64, 0), second], blocks);
    assert!(matches!(two(run(4096 + 32, 256, 64, 64), 4), CopyError::RunsOverlap { .. }));
    assert!(matches!(two(run(4096 + 256 + 224, 256, 64, 64), 4), CopyError::RunsOverlap { .. }));
    assert!(matches!(two(run(4096 + 128, 512, 64, 64), 4), CopyError::RunsOverlap { .. }));
    assert!(matches!(two(run(4096 + 63, 256, 64, 64), 1), CopyError::RunsOverlap { .. }));
    // One block of memory has no stride to overlap by.
    assert!(BlockLayout::new(vec![run(64, 0, 64, 0)], 1).is_ok());
}
