//! What every eviction policy must do, run for each of [`POLICIES`] and against broken ones that must fail.
#![expect(clippy::unwrap_used, reason = "a test's fixtures panic where a test may")]

use std::collections::BTreeMap;

use kvmp_core::clock::Ticks;
use kvmp_core::geometry::Geometry;
use kvmp_core::ids::{ChunkId, SlotId};
use kvmp_core::policy::{EvictionPolicy, Lru, POLICIES, PolicyFactory, Victim};

const CHUNKS: u32 = 3;
const SLOTS: u32 = 12;

type Verdict = Result<(), String>;

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(why()) }
}

fn geometry() -> Geometry {
    Geometry::new(u64::from(CHUNKS) * (2 << 20), None).unwrap()
}

#[derive(Clone, Debug, Default)]
struct Block {
    parent: Option<SlotId>,
    ready: bool,
    pins: u32,
    children: u32,
}

/// A caller that keeps the trait's promises.
struct Caller {
    policy: Box<dyn EvictionPolicy>,
    blocks: BTreeMap<SlotId, Block>,
    now: u64,
}

fn evictable(blocks: &BTreeMap<SlotId, Block>, slot: SlotId) -> bool {
    blocks.get(&slot).is_some_and(|b| b.ready && b.pins == 0 && b.children == 0)
}

impl Caller {
    fn new(make: PolicyFactory) -> Self {
        let mut policy = make(&geometry());
        (0..CHUNKS).for_each(|chunk| policy.add_chunk(ChunkId(chunk), SLOTS));
        Self { policy, blocks: BTreeMap::new(), now: 0 }
    }

    fn slots() -> impl Iterator<Item = SlotId> {
        (0..CHUNKS * SLOTS).map(|n| geometry().slot(ChunkId(n / SLOTS), n % SLOTS))
    }

    fn grant(&mut self, slot: SlotId, parent: Option<SlotId>) {
        self.blocks.insert(slot, Block { parent, ..Block::default() });
        if let Some(parent) = parent.and_then(|parent| self.blocks.get_mut(&parent)) {
            parent.children += 1;
        }
        self.policy.insert(slot, Ticks(self.now));
    }

    fn change(&mut self, slot: SlotId, change: impl FnOnce(&mut Block)) {
        let before = evictable(&self.blocks, slot);
        self.blocks.entry(slot).and_modify(change);
        if !before && evictable(&self.blocks, slot) {
            self.policy.evictable(slot);
        }
    }

    /// A Ready block in the cold.
    fn store(&mut self, slot: SlotId, parent: Option<SlotId>) {
        self.grant(slot, parent);
        self.change(slot, |block| block.ready = true);
    }

    fn remove(&mut self, slot: SlotId) {
        let parent = self.blocks.remove(&slot).and_then(|block| block.parent);
        self.policy.remove(slot, parent);
        if let Some(parent) = parent {
            self.change(parent, |block| block.children -= 1);
        }
    }

    fn coldest(&mut self) -> Result<Option<Victim>, String> {
        let blocks = &self.blocks;
        let victim = self.policy.coldest(&|slot| evictable(blocks, slot));
        let any = blocks.keys().any(|slot| evictable(blocks, *slot));
        ensure(victim.is_some() == any, || format!("{victim:?} of {blocks:?}"))?;
        if let Some(victim) = victim {
            ensure(evictable(blocks, victim.slot), || format!("{victim:?} may not go"))?;
            ensure(victim.last_use <= Ticks(self.now), || format!("{victim:?} is of the future"))?;
        }
        Ok(victim)
    }

    fn validate(&self) -> Verdict {
        let tracked: Vec<_> = self.blocks.keys().copied().collect();
        self.policy.validate(&tracked, &|slot| evictable(&self.blocks, slot))
    }
}

/// splitmix64: the suite repeats itself exactly.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % sides
    }

    fn pick(&mut self, from: &[SlotId]) -> Option<SlotId> {
        let index = self.roll(from.len().max(1) as u64) as usize;
        from.get(index).copied()
    }
}

/// One random call. Returns the slot that was evicted, if one was.
fn random_call(caller: &mut Caller, dice: &mut Dice) -> Result<Option<SlotId>, String> {
    let resident: Vec<_> = caller.blocks.keys().copied().collect();
    let free: Vec<_> = Caller::slots().filter(|slot| !caller.blocks.contains_key(slot)).collect();
    caller.now += dice.roll(2);
    let call = dice.roll(10);
    let Some(slot) = dice.pick(if call < 4 { &free } else { &resident }) else { return Ok(None) };
    match call {
        0..4 => caller.grant(slot, dice.pick(&resident).filter(|_| call > 0)),
        4 | 5 => caller.change(slot, |block| block.ready = true),
        6 if caller.blocks[&slot].ready => {
            caller.policy.touch(slot, Ticks(caller.now));
            caller.change(slot, |block| block.pins += 1);
        }
        7 if caller.blocks[&slot].pins > 0 => caller.change(slot, |block| block.pins -= 1),
        8 if caller.blocks[&slot].children == 0 && caller.blocks[&slot].pins == 0 => caller.remove(slot),
        9 => {
            let victim = caller.coldest()?.map(|victim| victim.slot);
            victim.into_iter().for_each(|slot| caller.remove(slot));
            return Ok(victim);
        }
        _ => {}
    }
    Ok(None)
}

fn only_evictable_slots_and_one_whenever_there_is_one(make: PolicyFactory) -> Verdict {
    for seed in 0..40 {
        let (mut caller, mut dice) = (Caller::new(make), Dice(seed));
        for _ in 0..400 {
            random_call(&mut caller, &mut dice)?;
            caller.validate()?;
        }
        // Whatever was pinned or Writing comes back, and all can go.
        let all: Vec<_> = caller.blocks.keys().copied().collect();
        all.iter().for_each(|slot| caller.change(*slot, |block| (block.ready, block.pins) = (true, 0)));
        while let Some(victim) = caller.coldest()? {
            caller.remove(victim.slot);
        }
        ensure(caller.blocks.is_empty(), || format!("left over: {:?}", caller.blocks))?;
    }
    Ok(())
}

fn the_same_calls_give_the_same_victims(make: PolicyFactory) -> Verdict {
    let run = || -> Result<Vec<SlotId>, String> {
        let (mut caller, mut dice) = (Caller::new(make), Dice(7));
        let victims = (0..2000).map(|_| random_call(&mut caller, &mut dice)).collect::<Result<Vec<_>, _>>()?;
        Ok(victims.into_iter().flatten().collect())
    };
    let (first, second) = (run()?, run()?);
    ensure(!first.is_empty() && first == second, || format!("{first:?}, then {second:?}"))
}

fn the_tail_of_a_chain_goes_first(make: PolicyFactory) -> Verdict {
    let mut caller = Caller::new(make);
    let chain: Vec<_> = Caller::slots().take(6).collect();
    let mut parent = None;
    for slot in &chain {
        caller.store(*slot, parent);
        parent = Some(*slot);
    }
    for expected in chain.iter().rev() {
        let victim = caller.coldest()?.map(|victim| victim.slot);
        ensure(victim == Some(*expected), || format!("{victim:?} goes before {expected:?}"))?;
        caller.remove(*expected);
    }
    Ok(())
}

fn coldest_changes_nothing(make: PolicyFactory) -> Verdict {
    let mut caller = Caller::new(make);
    Caller::slots().take(5).for_each(|slot| caller.store(slot, None));
    let first = caller.coldest()?;
    let second = caller.coldest()?;
    ensure(first == second, || format!("{first:?}, then {second:?}"))
}

fn chunks_come_and_go(make: PolicyFactory) -> Verdict {
    let mut caller = Caller::new(make);
    for _ in 0..3 {
        let slots: Vec<_> = Caller::slots().collect();
        slots.iter().for_each(|slot| caller.store(*slot, None));
        slots.iter().for_each(|slot| caller.remove(*slot));
        ensure(caller.coldest()?.is_none(), || "a victim in an empty policy".into())?;
        caller.policy.remove_chunk(ChunkId(1));
        caller.policy.add_chunk(ChunkId(1), SLOTS);
    }
    caller.validate()
}

fn conforms(make: PolicyFactory) -> Verdict {
    only_evictable_slots_and_one_whenever_there_is_one(make)?;
    the_same_calls_give_the_same_victims(make)?;
    the_tail_of_a_chain_goes_first(make)?;
    coldest_changes_nothing(make)?;
    chunks_come_and_go(make)
}

#[test]
fn every_policy_conforms() {
    for (name, make) in POLICIES {
        conforms(*make).unwrap_or_else(|why| panic!("{name}: {why}"));
    }
}

#[test]
fn lru_takes_the_least_recently_used() {
    let mut caller = Caller::new(|geometry| Box::new(Lru::new(geometry)));
    let slots: Vec<_> = Caller::slots().take(4).collect();
    slots.iter().for_each(|slot| caller.store(*slot, None));
    // All within one tick: the order is finer.
    [2, 0].iter().for_each(|i| caller.policy.touch(slots[*i], Ticks(caller.now)));
    for expected in [1, 3, 2, 0] {
        assert_eq!(caller.coldest().unwrap().map(|victim| victim.slot), Some(slots[expected]));
        caller.remove(slots[expected]);
    }
}

#[test]
fn lru_keeps_a_parent_as_hot_as_what_hung_on_it() {
    let mut caller = Caller::new(|geometry| Box::new(Lru::new(geometry)));
    let slots: Vec<_> = Caller::slots().take(3).collect();
    caller.store(slots[0], None);
    caller.store(slots[1], None);
    caller.store(slots[2], Some(slots[0]));
    // The child goes for another reason than the policy's choice; its heat stays.
    caller.remove(slots[2]);
    assert_eq!(caller.coldest().unwrap().map(|victim| victim.slot), Some(slots[1]));
}

/// An LRU with a fault.
struct Broken {
    lru: Lru,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Does not hear that a block became evictable again.
    Deaf,
    /// Takes the coldest block without asking whether it may go.
    Ruthless,
    /// Does not hand heat on to parents.
    Heirless,
}

impl EvictionPolicy for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn add_chunk(&mut self, chunk: ChunkId, slots: u32) {
        self.lru.add_chunk(chunk, slots);
    }
    fn remove_chunk(&mut self, chunk: ChunkId) {
        self.lru.remove_chunk(chunk);
    }
    fn insert(&mut self, slot: SlotId, now: Ticks) {
        self.lru.insert(slot, now);
    }
    fn touch(&mut self, slot: SlotId, now: Ticks) {
        self.lru.touch(slot, now);
    }
    fn remove(&mut self, slot: SlotId, heir: Option<SlotId>) {
        self.lru.remove(slot, heir.filter(|_| self.fault != Fault::Heirless));
    }
    fn evictable(&mut self, slot: SlotId) {
        if self.fault != Fault::Deaf {
            self.lru.evictable(slot);
        }
    }
    fn coldest(&mut self, evictable: &dyn Fn(SlotId) -> bool) -> Option<Victim> {
        self.lru.coldest(&|slot| self.fault == Fault::Ruthless || evictable(slot))
    }
    fn validate(&self, _: &[SlotId], _: &dyn Fn(SlotId) -> bool) -> Verdict {
        Ok(())
    }
}

#[test]
fn negative_control_broken_policies_do_not_conform() {
    let deaf: PolicyFactory = |geometry| Box::new(Broken { lru: Lru::new(geometry), fault: Fault::Deaf });
    let ruthless: PolicyFactory = |geometry| Box::new(Broken { lru: Lru::new(geometry), fault: Fault::Ruthless });
    assert!(conforms(deaf).is_err());
    assert!(conforms(ruthless).is_err());
}

#[test]
fn negative_control_lost_heat_shows() {
    let mut caller = Caller::new(|geometry| Box::new(Broken { lru: Lru::new(geometry), fault: Fault::Heirless }));
    let slots: Vec<_> = Caller::slots().take(3).collect();
    caller.store(slots[0], None);
    caller.store(slots[1], None);
    caller.store(slots[2], Some(slots[0]));
    caller.remove(slots[2]);
    assert_eq!(caller.coldest().unwrap().map(|victim| victim.slot), Some(slots[0]));
}
