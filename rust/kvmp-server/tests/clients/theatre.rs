//! The stage of these tests: a small server, two engines that mind their own business, and what they can see.

use std::collections::BTreeSet;

use kvmp_client::{ConnectOptions, ReadLease, ReserveList, WriteLease};
use kvmp_core::wire::Role;

use crate::puppet::{Ask, Grant, Puppet};
use crate::serve::Serve;
use crate::support::{Engine, chain, connect, patience, spec, until};

/// Bytes of the two parts: a block takes two pages.
pub const PARTS: [u64; 2] = [4096, 4096];
/// Slots of the whole arena: two chunks of 2 MiB.
pub const SLOTS: usize = 512;

pub struct Theatre {
    pub server: Serve,
    /// Two, as one engine may write half the arena at most.
    pub bystanders: Vec<Engine>,
}

impl Theatre {
    pub fn open(name: &str) -> Self {
        Self::with(Serve::start(name))
    }

    pub fn with(server: Serve) -> Self {
        let mut this = Self { server, bystanders: Vec::new() };
        this.seat();
        this
    }

    fn seat(&mut self) {
        self.bystanders = (0..2).map(|_| Engine::new(&self.server.endpoint(), &spec("m", &PARTS))).collect();
        until("the arena is backed", || self.stats()["warming"] == false);
        until("the thread that backs it has ended", || !self.server.has_thread("kvmp-backing"));
    }

    /// SIGKILLs the server, starts it again, and lets the bystanders attach anew.
    pub fn restart(&mut self) {
        self.server.restart();
        self.seat();
    }

    fn stats(&self) -> serde_json::Value {
        self.bystanders[0].stats()
    }

    pub fn stat(&self, name: &str) -> u64 {
        self.bystanders[0].stat(name)
    }

    /// Blocks that are Writing or held back.
    pub fn unsettled(&self) -> u64 {
        self.stat("blocks_writing") + self.stat("blocks_quarantined")
    }

    pub fn hit(&self, seed: u8, blocks: usize) -> usize {
        self.bystanders.iter().map(|engine| engine.hit(&chain(seed, blocks))).min().unwrap()
    }

    /// First bytes of a slot's part, as they lie in the arena.
    pub fn bytes_of(&self, slot: u32, part: usize) -> u64 {
        let (worker, joined) = &self.bystanders[0].workers[part];
        let places = worker.parts_at(joined, 0, &[slot]).unwrap();
        let mut bytes = [0; 8];
        places.arena.read(places.offsets[0], &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Waits until somebody's copy is seen to write into a slot.
    pub fn sees_a_copy(&self, slot: u32, part: usize) {
        let before = self.bytes_of(slot, part);
        until("the copy goes on", || self.bytes_of(slot, part) != before);
    }

    /// Waits, by the server's clock, until the grace of DMA copies has passed: so long a writer that is gone is waited for.
    pub fn grace_passes(&self) {
        let held = self.unsettled();
        let scheduler = connect(&self.server.endpoint(), &ConnectOptions::new(Role::Scheduler));
        let namespace = scheduler.open(&spec("dma", &[8192]), &patience()).unwrap();
        let list = ReserveList { hashes: &chain(1, 1), first_block: 0, parent: None, group: 0 };
        scheduler.reserve(&namespace, &list, &patience()).unwrap().hand_over();
        let token = Some(scheduler.engine_token());
        let dma = ConnectOptions { engine_token: token, part: Some(0), dma: true, ..ConnectOptions::new(Role::Worker) };
        drop(connect(&self.server.endpoint(), &dma));
        assert_eq!(self.unsettled(), held + 1);
        until("the grace passes", || self.unsettled() == held);
    }

    /// Stores and hits chain after chain, four times the arena: every byte of every hit is checked.
    pub fn goes_on(&self) {
        let evictions = self.stat("evictions");
        let (mut stored, mut hits) = (0, 0);
        for seed in 0..40 {
            stored += self.bystanders[usize::from(seed) % 2].store(&chain(100 + seed, 60));
            hits += self.hit(100 + seed, 60) + self.hit(100 + seed.saturating_sub(1), 60);
        }
        assert!(stored > 4 * SLOTS && hits > stored, "{stored} stored, {hits} hit");
        assert!(self.stat("evictions") > evictions + 2 * SLOTS as u64);
    }

    /// Takes every slot that is to be had, in a chain of its own; gives them back at once. Blocks of `spared` stay.
    pub fn all_slots_to_be_had(&self, spared: &[u8]) -> BTreeSet<u32> {
        let pins: Vec<ReadLease> = spared.iter().map(|seed| self.bystanders[0].lookup(&chain(*seed, SLOTS))).collect();
        let held = self.unsettled();
        let leases: Vec<WriteLease> =
            self.bystanders.iter().zip(200..).map(|(engine, seed)| engine.reserve(&chain(seed, SLOTS))).collect();
        let slots: BTreeSet<u32> = leases.iter().flat_map(Engine::granted).map(|granted| granted.1).collect();
        assert_eq!(self.stat("slots_free"), 0, "there was more to be had");
        drop((leases, pins));
        until("they are given back", || self.unsettled() == held);
        slots
    }
}

/// An engine of three processes.
pub struct Cast {
    pub scheduler: Puppet,
    pub workers: Vec<Puppet>,
}

impl Cast {
    pub fn new(theatre: &Theatre) -> Self {
        let endpoint = theatre.server.endpoint();
        let scheduler = Puppet::scheduler(&endpoint, &PARTS);
        let workers = (0..2).map(|part| Puppet::worker(&endpoint, &PARTS, scheduler.token, part)).collect();
        Self { scheduler, workers }
    }

    /// Reserves 12 blocks: 0 to 3 get both parts, 4 to 7 part 0 only, 8 to 11 none.
    pub fn store_in_part(&mut self, seed: u8) -> Grant {
        let grant = self.scheduler.reserve(seed, 12);
        assert_eq!(grant.slots.len(), 12);
        self.workers[0].store(&grant.of(0..8));
        self.workers[1].store(&grant.of(0..4));
        grant
    }

    /// Both workers begin copies of what they have not committed, and are seen to write.
    pub fn copy(&mut self, theatre: &Theatre, grant: &Grant) {
        for (part, first) in [(0, 8), (1, 4)] {
            self.workers[part].count(&Ask::Storm(grant.of(first..12)));
            theatre.sees_a_copy(grant.slots[11].1, part);
        }
    }
}
