//! A damaged segment: a server starts on it, warm or cold, and serves no block of another key's bytes, in this life and in
//! the next.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use kvmp_core::geometry::Geometry;
use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::segment::{Layout, SegmentHeader};

use crate::attached::Attached;
use crate::image::{Dice, Image, Region};
use crate::served::{House, Served};
use crate::support::{Hash, chain, patience, spec, until};

const MIB: u64 = 1 << 20;
/// Slots of three sizes, which take chunks from each other: bytes, and blocks of a chain.
const SIZES: [(u64, usize); 3] = [(4096, 150), (9000, 50), (20_000, 30)];
/// Chains that one size stores in its turn: three quarters of the arena.
const TURN: u8 = 5;
/// Turns before the damage, and in all.
const TURNS: (u8, u8) = (7, 10);

/// Three engines of different slot sizes.
struct Engines(Vec<Attached>);

impl Engines {
    fn new(house: &House) -> Self {
        let new = |(bytes, _)| Attached::new(&house.endpoint(), &spec(&format!("m{bytes}"), &[bytes]), None).unwrap();
        Self(SIZES.map(new).into())
    }

    /// Whose turn it is, and its chains.
    fn turn(&self, turn: u8) -> (&Attached, impl Iterator<Item = Vec<Hash>>) {
        let size = usize::from(turn % 3);
        (&self.0[size], (turn * TURN..(turn + 1) * TURN).map(move |seed| chain(seed, SIZES[size].1)))
    }

    /// Each size in turn fills most of the arena, so that chunks move from size to size.
    fn store(&self, turns: std::ops::Range<u8>) {
        for turn in turns {
            let (engine, chains) = self.turn(turn);
            chains.for_each(|chain| assert!(engine.store(&chain).is_ok()));
        }
    }

    /// Blocks that are hit of all chains, each of its own bytes.
    fn hit(&self) -> usize {
        let of = |turn| {
            let (engine, chains) = self.turn(turn);
            chains.map(|chain| engine.hit(&chain).unwrap()).sum::<usize>()
        };
        (0..TURNS.1).map(of).sum()
    }
}

fn start(house: &House) -> Served {
    house.start(&["--size", "4MiB"])
}

/// Chunks that have been of every size, blocks of all sizes, and a reservation that nobody will ever commit.
fn make_image(house: &House) -> Image {
    let mut served = start(house);
    let engines = Engines::new(house);
    until("the arena is backed", || engines.0[0].stats()["warming"] == false);
    for turn in 0..TURNS.0 {
        engines.store(turn..turn + 1);
        // The next turn's blocks are hotter by the store's clock, so that it may have the others' chunks.
        let tick = Instant::now();
        until("a tick has passed", || tick.elapsed() > Duration::from_millis(63));
    }
    let (moves, hits) = (engines.0[0].stat("chunk_moves"), engines.hit());
    assert!(moves > 3 && hits > 100, "{moves} moves, {hits} hits");
    let list = kvmp_client::ReserveList { hashes: &chain(250, 5), first_block: 0, parent: None, group: 0 };
    let writing = engines.0[1].scheduler.reserve(&engines.0[1].namespace, &list, &crate::support::patience()).unwrap();
    served.kill();
    drop(writing);
    Image::of(&house.file(), Geometry::new(4 * MIB, Some(2 * MIB)).unwrap(), SIZES.len() as u64)
}

/// What a start made of a file.
#[derive(Default, Debug)]
struct Outcomes {
    cold: usize,
    /// Fewer blocks than there were.
    partly: usize,
    whole: usize,
}

impl Outcomes {
    fn count(&mut self, log: &str, hits: usize, all: usize) {
        *match (log.contains("is replaced by a new, empty one"), hits) {
            (true, hits) => {
                assert_eq!(hits, 0);
                &mut self.cold
            }
            (false, hits) if hits < all => &mut self.partly,
            _ => &mut self.whole,
        } += 1;
    }
}

/// A damaged file lives twice: it is recovered, used in earnest, and recovered again after a SIGKILL.
fn live_twice(house: &House) -> (String, usize) {
    let mut served = start(house);
    let engines = Engines::new(house);
    let hits = engines.hit();
    engines.store(TURNS.0..TURNS.1);
    engines.hit();
    served.kill();
    let first = served.log();
    drop(engines);
    let mut served = start(house);
    let engines = Engines::new(house);
    engines.hit();
    let log = first.clone() + &served.stop();
    assert!(!log.contains("panicked"), "{log}");
    (first, hits)
}

/// How many damaged files are tried; `KVMP_DAMAGED` asks for more.
fn rounds() -> u64 {
    std::env::var("KVMP_DAMAGED").map_or(28, |text| text.parse().unwrap())
}

#[test]
fn damaged_files_start_and_serve_nothing_wrong() {
    let house = House::new();
    let image = make_image(&house);
    image.lay(&house.segment());
    let (_, all) = live_twice(&house);
    assert!(all > 100, "{all}");
    let mut outcomes = Outcomes::default();
    for round in 0..rounds() {
        let mut dice = Dice(round);
        let file = image.lay(&house.segment());
        let region = Region::ALL[(round % Region::ALL.len() as u64) as usize];
        for _ in 0..=dice.roll(if region == Region::States { 500 } else { 8 }) {
            image.damage(&file, region, &mut dice);
        }
        eprintln!("round {round}: {region:?}");
        let (log, hits) = live_twice(&house);
        outcomes.count(&log, hits, all);
    }
    eprintln!("{outcomes:?}");
    assert!(outcomes.cold > 0 && outcomes.partly > 0 && outcomes.whole > 0, "{outcomes:?}");
}

/// A block size with the one chunk of a small arena to itself: chains of ten blocks that fill it, each by its own bytes.
struct Alone {
    bytes: u64,
    chains: u8,
}

const SMALL: Alone = Alone { bytes: 9000, chains: 17 };
const LARGE: Alone = Alone { bytes: 20_000, chains: 10 };

impl Alone {
    fn attach(&self, house: &House) -> Attached {
        let attached =
            Attached::new(&house.endpoint(), &spec(&format!("m{}", self.bytes), &[self.bytes]), None).unwrap();
        until("the arena is backed", || attached.stats()["warming"] == false);
        attached
    }

    fn fill(&self, house: &House) {
        let engine = self.attach(house);
        let stored: u32 = (0..self.chains).map(|seed| engine.store(&chain(seed, 10)).unwrap()).sum();
        assert!(stored == u32::from(self.chains) * 10 || stored == 0, "{stored}");
        engine.scheduler.clear(&patience()).unwrap();
    }

    fn hits(&self, house: &House) -> usize {
        let engine = self.attach(house);
        (0..self.chains).map(|seed| engine.hit(&chain(seed, 10)).unwrap()).sum()
    }
}

/// The large blocks lie over the bytes of the small ones; then the chunk is of the small size again, with one block.
fn overwrite(house: &House) {
    LARGE.fill(house);
    let small = SMALL.attach(house);
    small.store(&chain(200, 1)).unwrap();
}

fn start_small(house: &House) -> Served {
    house.start(&["--size", "2MiB"])
}

#[test]
fn a_chunk_whose_word_lies_brings_no_block_back_that_was_written_over() {
    let word = Layout::new(Geometry::new(2 * MIB, None).unwrap()).chunk_word(ChunkId(0));
    // Free, as it was written before words had a seal; Cold; another size.
    for lie in [1u64, 0, 2 | 5 << 32] {
        let house = House::new();
        let mut served = start_small(&house);
        let small = SMALL.attach(&house);
        let stored: u32 = (0..SMALL.chains).map(|seed| small.store(&chain(seed, 10)).unwrap()).sum();
        assert_eq!(stored, 170);
        served.kill();
        house.file().write_all_at(&lie.to_ne_bytes(), word).unwrap();
        let mut served = start_small(&house);
        overwrite(&house);
        served.kill();
        let mut served = start_small(&house);
        assert_eq!(SMALL.hits(&house), 0, "{}", served.log());
        served.stop();
    }
}

#[test]
fn a_record_that_was_evicted_does_not_come_back_by_a_flipped_state() {
    let house = House::new();
    let mut served = start_small(&house);
    SMALL.fill(&house);
    overwrite(&house);
    served.kill();
    // Free -> Ready, in every record behind those that the large blocks had.
    let layout = Layout::new(Geometry::new(2 * MIB, None).unwrap());
    let file = house.file();
    for slot in 110..170 {
        file.write_all_at(&[2], layout.record(SlotId(slot)).unwrap() + 1).unwrap();
    }
    let served = start_small(&house);
    assert_eq!(SMALL.hits(&house), 0);
    assert!(served.log().contains("60 dropped"), "{}", served.log());
}

/// Recoveries begun and not finished, as the header has them.
fn recoveries_begun(file: &std::fs::File) -> u64 {
    let mut header = [0; SegmentHeader::BYTES];
    file.read_exact_at(&mut header, 0).unwrap();
    SegmentHeader::parse(&header).unwrap().recoveries_begun
}

/// Starts a server and kills it while it recovers; false if it was faster.
fn killed_in_recovery(house: &House, file: &std::fs::File) -> bool {
    let before = recoveries_begun(file);
    let mut served = house.spawn(&["--size", "64MiB"]);
    until("it begins to recover", || recoveries_begun(file) != before || served.log().contains("ready:"));
    served.kill();
    recoveries_begun(file) == before + 1
}

#[test]
fn a_third_recovery_in_a_row_that_would_fail_is_not_tried() {
    let house = House::new();
    let mut served = house.start(&["--size", "64MiB"]);
    let engine = Attached::new(&house.endpoint(), &spec("m", &[4096]), None).unwrap();
    until("the arena is backed", || engine.stats()["warming"] == false);
    // Enough to recover that the kill comes in the middle.
    for seed in 0..8 {
        assert_eq!(engine.store(&chain(seed, 2000)).unwrap(), 2000);
    }
    served.kill();
    drop(engine);
    let (file, inode) = (house.file(), house.inode());
    // One that dies counts; one that goes through makes good for it.
    until("a recovery is killed", || killed_in_recovery(&house, &file));
    let mut served = house.start(&["--size", "64MiB"]);
    let engine = Attached::new(&house.endpoint(), &spec("m", &[4096]), None).unwrap();
    assert_eq!((recoveries_begun(&file), engine.hit(&chain(0, 2000)).unwrap()), (0, 2000));
    served.kill();
    until("two in a row are killed", || killed_in_recovery(&house, &file) && recoveries_begun(&file) == 2);
    assert_eq!(house.inode(), inode);
    let mut served = house.start(&["--size", "64MiB"]);
    assert!(served.log().contains("new, empty one: 2 recoveries in a row did not finish"), "{}", served.log());
    assert_ne!(house.inode(), inode);
    let engine = Attached::new(&house.endpoint(), &spec("m", &[4096]), None).unwrap();
    assert_eq!(engine.hit(&chain(0, 2000)).unwrap(), 0);
    assert!(served.is_running());
}
