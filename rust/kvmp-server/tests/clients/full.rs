//! An arena full of pinned blocks, and requests larger than the arena: a part is granted or nothing, with a code that is
//! counted; nothing is said to be stored that is not, and nobody waits.

use kvmp_client::{Bound, ReadLease, ReserveList, WriteLease};
use kvmp_core::wire::Answer;

use crate::support::{Engine, Hash, chain, spec, until};
use crate::theatre::{PARTS, SLOTS, Theatre};

/// Ten times an engine's bound.
const WATCHDOG_MS: u64 = 1000;
const HALF: usize = SLOTS / 2;

fn reserve(engine: &Engine, hashes: &[Hash]) -> WriteLease {
    let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
    engine.scheduler.reserve(&engine.namespace, &list, &Bound::ms(WATCHDOG_MS)).unwrap()
}

/// Answers of a kind.
fn count(lease: &WriteLease, answer: Answer) -> usize {
    lease.answers().iter().filter(|&&code| u32::from(code) == answer as u32).count()
}

/// Each bystander stores half the arena and pins it.
fn pin_everything(theatre: &Theatre) -> Vec<ReadLease> {
    let engines = theatre.bystanders.iter().zip(1..);
    let leases: Vec<ReadLease> = engines
        .map(|(engine, seed)| {
            assert_eq!(engine.store(&chain(seed, HALF)), HALF);
            engine.lookup(&chain(seed, HALF))
        })
        .collect();
    assert!(leases.iter().all(ReadLease::pinned));
    assert_eq!((theatre.stat("slots_free"), theatre.stat("blocks_ready")), (0, SLOTS as u64));
    leases
}

#[test]
fn nothing_is_granted_where_all_is_pinned_and_that_is_said_and_counted() {
    let theatre = Theatre::open("pinned");
    let pins = pin_everything(&theatre);
    let third = Engine::new(&theatre.server.endpoint(), &spec("m", &PARTS));
    let (no_space, no_parent) = (theatre.stat("no_space"), theatre.stat("no_parent"));
    let lease = reserve(&third, &chain(3, 50));
    assert_eq!((lease.lease_id(), count(&lease, Answer::NoSpace), count(&lease, Answer::NoParent)), (0, 1, 49));
    assert_eq!((theatre.stat("no_space"), theatre.stat("no_parent")), (no_space + 1, no_parent + 49));
    assert_eq!((theatre.stat("evictions"), third.hit(&chain(3, 50)), third.store(&chain(3, 50))), (0, 0, 0));
    assert_eq!((theatre.hit(1, HALF), theatre.hit(2, HALF)), (HALF, HALF));
    // Over its cap an engine's hits go on, without a pin.
    let over = theatre.bystanders[0].lookup(&chain(2, HALF));
    assert!(!over.pinned() && over.tokens() == 16 * HALF as u64);
    drop(pins);
    until("there is room again", || third.store(&chain(3, 50)) == 50);
    assert_eq!(third.hit(&chain(3, 50)), 50);
}

#[test]
fn of_a_request_larger_than_the_arena_the_first_blocks_are_granted() {
    let theatre = Theatre::open("larger");
    let engine = &theatre.bystanders[0];
    // The third is longer than a request may be.
    for (seed, blocks) in [(1, SLOTS + 1), (2, 16_384), (3, 20_000)] {
        let hashes = chain(seed, blocks);
        let mut lease = reserve(engine, &hashes);
        let granted: Vec<usize> = Engine::granted(&lease).iter().map(|granted| granted.0).collect();
        assert_eq!(granted, (0..HALF).collect::<Vec<_>>(), "an engine may write half the arena");
        assert!(lease.answers()[HALF..].iter().all(|&answer| answer != Answer::Granted as u8));
        assert_eq!(lease.answers()[HALF], Answer::NoSpace as u8);
        lease.hand_over();
        (0..PARTS.len()).for_each(|part| engine.write_part(part, &lease, &hashes));
        assert_eq!(theatre.hit(seed, HALF + 10), HALF, "what was granted and written is there, and no more");
    }
    assert_eq!((theatre.stat("no_space"), theatre.unsettled()), (3, 0));
    assert_eq!(theatre.stat("committed_blocks"), 3 * HALF as u64);
}
