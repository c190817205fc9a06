//! A server whose file was made shorter lets go of it, and answers nothing any more that is not in the file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvmp_core::geometry::Geometry;
use kvmp_core::ids::SlotId;
use kvmp_core::ring::{COMPLETIONS, Consumer, MappedQueue};
use kvmp_core::segment::Layout;
use kvmp_core::wire::{Completion, GrantOut, Op, Role, Submission};
use zerocopy::IntoBytes;

use crate::load::filled;
use crate::raw::Raw;
use crate::served::{House, Served};
use crate::support::{chain, spec, until};

const MIB: u64 = 1 << 20;
/// In the scratch area: where answers go, behind one key.
const OUT: u32 = 64;

/// A scheduler that looks for its answers in the ring only, never at its socket: a hang-up does not stop it.
struct Asker {
    raw: Raw,
    completions: Consumer<MappedQueue>,
    namespace: u16,
    file: File,
}

impl Asker {
    fn new(house: &House) -> Self {
        let raw = Raw::attach(&house.socket(), Role::Scheduler);
        let namespace = raw.open(&spec("m", &[9000]));
        raw.ring.write_scratch(0, &chain(1, 1)[0]);
        let completions = Consumer::new(raw.ring.queue(COMPLETIONS));
        Self { raw, completions, namespace, file: house.file() }
    }

    /// `None`: the server has ended without an answer.
    fn ask(&mut self, served: &mut Served, submission: Submission) -> Option<Completion> {
        self.raw.submit(submission);
        let mut answer = None;
        until("it answers or ends", || {
            let runs = served.is_running();
            answer = self.completions.pop().unwrap().map(Completion::from_entry);
            answer.is_some() || !runs
        });
        answer
    }

    /// Asks for a slot, looks whether the file says that it is ours, and gives it back.
    fn round(&mut self, served: &mut Served) -> Option<()> {
        let (op, namespace) = (Op::Reserve as u8, self.namespace);
        let reserve = Submission {
            op,
            namespace,
            count: 1,
            in_bytes: 32,
            out_offset: OUT,
            out_bytes: 16,
            ..Submission::default()
        };
        let granted = self.ask(served, reserve)?;
        assert_eq!((granted.code, granted.count), (0, 1), "{granted:?}");
        let mut grant = GrantOut::default();
        self.raw.ring.read_scratch(OUT, grant.as_mut_bytes());
        assert_eq!(self.word(SlotId(grant.slot)), grant.word, "it granted what every reader takes for another block's");
        self.ask(served, Submission { op: Op::Cancel as u8, lease: granted.lease, ..Submission::default() })?;
        Some(())
    }

    /// A slot's word, read from the file: a mapping of it might end this test.
    fn word(&self, slot: SlotId) -> u64 {
        let layout = Layout::new(Geometry::new(16 * MIB, Some(2 * MIB)).unwrap());
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, layout.record(slot).unwrap()).unwrap();
        u64::from_ne_bytes(word)
    }
}

#[test]
fn what_an_attached_client_is_told_is_in_the_file_until_the_server_ends() {
    let house = House::new();
    let mut served = house.start(&[]);
    served.says("are backed");
    let mut asker = Asker::new(&house);
    (0..50).for_each(|_| asker.round(&mut served).unwrap());
    // The last chunk; the table stays.
    asker.file.set_len(80 * MIB).unwrap();
    let mut rounds = 0;
    while asker.round(&mut served).is_some() {
        rounds += 1;
    }
    assert_eq!(served.wait().code(), Some(1), "{}", served.log());
    assert!(served.log().contains("it was made shorter from outside, to 80 MiB of"), "{}", served.log());
    eprintln!("{rounds} rounds between the shortening and the end");
}

#[test]
fn a_file_that_was_shorter_for_a_moment_is_served_from_no_more() {
    let house = House::new();
    let (mut served, engine) = filled(&house, &[]);
    let (file, inode) = (house.file(), house.inode());
    let bytes = file.metadata().unwrap().len();
    // Its last page; the engine's blocks lie elsewhere. By the next look, it is as long as ever.
    file.set_len(bytes - 4096).unwrap();
    file.set_len(bytes).unwrap();
    assert_eq!(served.wait().code(), Some(1), "{}", served.log());
    assert!(served.log().contains("shorter and longer again from outside"), "{}", served.log());
    assert!(!house.segment().exists(), "the next start would take it for whole");
    let mut next = house.start(&[]);
    assert_ne!(house.inode(), inode);
    let again = engine.again(&house.endpoint());
    // Before a chunk is backed there is room for nothing.
    next.says("are backed");
    assert_eq!((again.hit(&chain(1, 50)).unwrap(), again.store(&chain(1, 50)).unwrap()), (0, 50));
    // One that was recovered is watched as well.
    next.kill();
    let mut next = house.start(&[]);
    let file = house.file();
    file.set_len(bytes - 4096).unwrap();
    file.set_len(bytes).unwrap();
    assert_eq!(next.wait().code(), Some(1), "{}", next.log());
    assert!(next.log().contains("50 blocks kept") && next.log().contains("longer again"), "{}", next.log());
}

#[test]
fn another_file_under_the_name_is_not_removed_with_one_that_lost_memory() {
    let house = House::new();
    for lost in [4096, 0] {
        let mut served = house.start(&["--fresh"]);
        served.says("are backed");
        let file = house.file();
        let bytes = file.metadata().unwrap().len();
        std::fs::write(house.path("notes"), "mine").unwrap();
        std::fs::rename(house.path("notes"), house.segment()).unwrap();
        file.set_len(bytes - 4096).unwrap();
        file.set_len(bytes - 4096 + lost).unwrap();
        assert_eq!(served.wait().code(), Some(1), "{}", served.log());
        assert_eq!(std::fs::read(house.segment()).unwrap(), b"mine", "{}", served.log());
        std::fs::remove_file(house.segment()).unwrap();
    }
}

#[test]
fn a_file_that_was_shorter_while_no_server_had_it_is_not_gone_on_with() {
    // The last chunk, and all of them; the table, and what it says of blocks, stays.
    for lost in [2 * MIB, 16 * MIB] {
        let house = House::new();
        let (mut served, engine) = filled(&house, &[]);
        served.says("are backed");
        served.stop();
        let (file, inode) = (house.file(), house.inode());
        let bytes = file.metadata().unwrap().len();
        file.set_len(bytes - lost).unwrap();
        file.set_len(bytes).unwrap();
        let next = house.start(&[]);
        assert_eq!(engine.again(&house.endpoint()).hit(&chain(1, 50)).unwrap(), 0);
        assert!(next.log().contains("replaced by a new, empty one: it has lost"), "{}", next.log());
        assert_ne!(house.inode(), inode);
    }
}
