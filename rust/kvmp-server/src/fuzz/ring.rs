//! Any entries, positions and scratch bytes on the rings of an engine, against the real data plane over a real segment: it
//! never panics, its store stays whole, a bystander's pinned blocks stay, and a session that ended leaves nothing.

use kvmp_core::ring::{COMPLETIONS, QueueCells, Ring, SCRATCH_BYTES, SUBMISSIONS};
use kvmp_core::sync::Ordering;
use kvmp_core::wire::{Completion, GrantOut, Op, PartIn, Submission};
use zerocopy::{FromBytes, IntoBytes};

use super::bytes::Bytes;
use super::stage::{PARTS, Stage};

/// Where an engine's keys lie in its scratch area, its slots, and the answers.
const KEYS: u32 = 0;
const SLOTS: u32 = 1 << 20;
const ANSWERS: u32 = 2 << 20;
/// Actions of one input.
const ACTIONS: usize = 256;

/// What came of it, for the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Sessions that the data plane ended.
    pub ended: u64,
    pub committed_blocks: u64,
    pub hit_blocks: u64,
}

pub fn ring(data: &[u8]) -> Seen {
    let mut input = Bytes::new(data);
    let mut stage = Stage::new();
    for _ in 0..ACTIONS {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        act(&mut stage, choice & 3, choice >> 2, &mut input);
    }
    stage.finish()
}

fn act(stage: &mut Stage, who: u8, what: u8, input: &mut Bytes<'_>) {
    let actor = stage.actor(who);
    match what & 15 {
        0 => actor.push(std::array::from_fn(|_| input.u64())),
        1..=5 => tame(stage, who, what & 15, input),
        6 => lay_chain(&actor.ring, input.u8(), input.u8()),
        7 => {
            let (at, bytes) = (input.u32() % SCRATCH_BYTES as u32, input.u8());
            let bytes = input.take(usize::from(bytes));
            if Ring::in_scratch(at, bytes.len() as u32) {
                actor.ring.write_scratch(at, bytes);
            }
        }
        8 => lie(&actor.ring, input),
        9 => lay_grants(stage, input),
        10 => stage.end(who),
        _ => stage.turns(usize::from(what >> 4) + 1),
    }
}

/// An entry that gets past the first checks, most of the time.
fn tame(stage: &mut Stage, who: u8, what: u8, input: &mut Bytes<'_>) {
    // What the scheduler was granted is what its workers write.
    let leases = stage.actor(0).leases;
    let actor = stage.actor(who);
    let op = [Op::Lookup, Op::Reserve, Op::Commit, Op::Abort, Op::Cancel, Op::Release, Op::Distrust, Op::Stats];
    let (op, count) = (op[usize::from(input.u8()) % op.len()], u32::from(input.u8()));
    let (place, item, front) = match op {
        Op::Commit | Op::Abort | Op::Distrust => (SLOTS, size_of::<PartIn>() as u32, 0),
        _ => (KEYS, 32, if op == Op::Reserve && what == 1 { 32 } else { 0 }),
    };
    let in_bytes = if matches!(op, Op::Lookup | Op::Reserve | Op::Commit | Op::Abort | Op::Distrust) {
        front + count * item
    } else {
        0
    };
    actor.asked += 1;
    let entry = Submission {
        request: actor.asked,
        op: op as u8,
        flags: u8::from(front > 0),
        namespace: actor.namespaces[usize::from(what == 2)],
        group: u16::from(what == 3),
        part: actor.part,
        count,
        in_offset: place,
        in_bytes,
        out_offset: ANSWERS,
        out_bytes: 1 << 20,
        lease: leases[usize::from(input.u8()) % leases.len()],
        first_block: if front > 0 || what == 4 { u32::from(input.u8()) } else { 0 },
        ..Submission::default()
    };
    // One kind in five has any one byte of it changed.
    let mut words = entry.to_entry();
    if what == 5 {
        words[usize::from(input.u8()) % 8] ^= input.u64();
    }
    actor.push(words);
}

/// Keys of a chain, so that lookups hit what was stored.
fn lay_chain(ring: &Ring, seed: u8, from: u8) {
    let keys: Vec<[u8; 32]> =
        (u32::from(from)..u32::from(from) + 64).map(|block| super::stage::key(seed, block)).collect();
    ring.write_scratch(KEYS, keys.as_flattened());
}

/// What the scheduler was granted last goes into the workers' scratch areas, as their orders.
fn lay_grants(stage: &mut Stage, input: &mut Bytes<'_>) {
    let mut out = vec![0; 64 * size_of::<GrantOut>()];
    stage.actor(0).ring.read_scratch(ANSWERS, &mut out);
    let spoil = input.u8();
    let grants = out.chunks_exact(size_of::<GrantOut>()).map(|grant| GrantOut::read_from_bytes(grant).unwrap());
    let orders: Vec<PartIn> = grants
        .map(|grant| PartIn { slot: grant.slot, word: grant.word ^ u64::from(spoil & 1), ..PartIn::default() })
        .collect();
    for worker in 1..=PARTS as u8 {
        stage.actor(worker).ring.write_scratch(SLOTS, orders.as_bytes());
    }
}

/// Positions that a client may write, or may not.
fn lie(ring: &Ring, input: &mut Bytes<'_>) {
    let (submissions, completions) = (ring.queue(SUBMISSIONS), ring.queue(COMPLETIONS));
    let position = match input.u8() % 4 {
        0 => submissions.tail(),
        1 => submissions.head(),
        2 => completions.tail(),
        _ => completions.head(),
    };
    let value = if input.u8() < 128 {
        position.load(Ordering::Relaxed).wrapping_add(u64::from(input.u8()))
    } else {
        input.u64()
    };
    position.store(value, Ordering::Release);
}

/// Takes a completion's lease for later use.
pub(super) fn learn(leases: &mut [u64], entry: [u64; 8]) {
    let lease = Completion::from_entry(entry).lease;
    if lease != 0 {
        leases[lease as usize % leases.len()] = lease;
    }
}
