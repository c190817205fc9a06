//! An engine as these tests need it: a scheduler and its workers as clients, blocks whose bytes tell their key.

pub mod house;
pub mod refused;
pub mod served;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use kvmp_client::{Bound, Client, ConnectOptions, Namespace, ReadLease, ReserveList, WriteLease};
use kvmp_core::namespace::{GroupRule, GroupSpec, NamespaceSpec, PartSpec};
use kvmp_core::wire::Role;
use serde_json::{Value, json};

pub type Hash = [u8; 32];

/// A bound that only a hang passes: these tests show what happens, not how fast.
pub fn patience() -> Bound<'static> {
    Bound::ms(20_000)
}

/// Waits until `done`, or fails with `what` after a watchdog's time.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let watchdog = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < watchdog, "never came true: {what}");
        std::thread::yield_now();
    }
}

pub fn spec(model: &str, part_bytes: &[u64]) -> NamespaceSpec {
    NamespaceSpec {
        model: model.into(),
        facts: BTreeMap::from([("dtype".into(), json!("float32"))]),
        groups: vec![GroupSpec { rule: GroupRule::Prefix, block_tokens: 16, window_tokens: 0, hash_stride: 1 }],
        parts: part_bytes.iter().map(|&b| PartSpec { bytes: vec![b], layout: json!({ "bytes": b }) }).collect(),
        salt: String::new(),
    }
}

/// Hashes of a chain: every one depends on those before it.
pub fn chain(seed: u8, blocks: usize) -> Vec<Hash> {
    (0..blocks)
        .map(|i| std::array::from_fn(|b| if b == 0 { seed } else { (i >> (8 * (b % 4))) as u8 ^ b as u8 }))
        .collect()
}

/// The one byte that a block's part is filled with.
pub fn fill(hash: &Hash, part: u16) -> u8 {
    hash.iter().fold(part as u8 + 1, |sum, byte| sum.wrapping_mul(31).wrapping_add(*byte)) | 1
}

pub struct Engine {
    pub scheduler: Client,
    pub namespace: Namespace,
    pub workers: Vec<(Client, Namespace)>,
}

pub fn connect(endpoint: &str, options: &ConnectOptions) -> Client {
    Client::connect(endpoint, options, &patience()).unwrap()
}

impl Engine {
    pub fn new(endpoint: &str, spec: &NamespaceSpec) -> Self {
        let scheduler = connect(endpoint, &ConnectOptions::new(Role::Scheduler));
        let namespace = scheduler.open(spec, &patience()).unwrap();
        let mut engine = Self { scheduler, namespace, workers: Vec::new() };
        for part in 0..spec.parts.len() as u16 {
            engine.join(endpoint, part);
        }
        engine
    }

    pub fn worker_options(&self, part: u16) -> ConnectOptions {
        ConnectOptions {
            engine_token: Some(self.scheduler.engine_token()),
            part: Some(part),
            ..ConnectOptions::new(Role::Worker)
        }
    }

    fn join(&mut self, endpoint: &str, part: u16) {
        let worker = connect(endpoint, &self.worker_options(part));
        let layout = &self.namespace.spec().parts[usize::from(part)].layout;
        let joined = worker.join(self.namespace.id(), self.namespace.digest(), layout, &patience()).unwrap();
        self.workers.push((worker, joined));
    }

    /// Reserves the blocks of a chain from its first on.
    pub fn reserve(&self, hashes: &[Hash]) -> WriteLease {
        let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
        self.scheduler.reserve(&self.namespace, &list, &patience()).unwrap()
    }

    /// Granted (index, slot, word) of a lease.
    pub fn granted(lease: &WriteLease) -> Vec<(usize, u32, u64)> {
        let all = lease.answers().iter().zip(lease.slots()).zip(lease.words()).enumerate();
        all.filter(|(_, ((answer, _), _))| **answer == 0).map(|(i, ((_, slot), word))| (i, *slot, *word)).collect()
    }

    /// Writes and commits one worker's part of what a lease granted.
    pub fn write_part(&self, part: usize, lease: &WriteLease, hashes: &[Hash]) {
        let granted = Self::granted(lease);
        let slots: Vec<u32> = granted.iter().map(|g| g.1).collect();
        let words: Vec<u64> = granted.iter().map(|g| g.2).collect();
        let (worker, joined) = &self.workers[part];
        let places = worker.parts_at(joined, 0, &slots).unwrap();
        for ((index, ..), offset) in granted.iter().zip(&places.offsets) {
            places.arena.write(*offset, &vec![fill(&hashes[*index], part as u16); places.bytes as usize]);
        }
        let taken = worker.commit(lease.lease_id(), &slots, &words, None, &patience()).unwrap();
        assert_eq!(taken as usize, slots.len());
    }

    /// Stores what is not there yet of a chain; how many blocks.
    pub fn store(&self, hashes: &[Hash]) -> usize {
        let mut lease = self.reserve(hashes);
        lease.hand_over();
        for part in 0..self.workers.len() {
            self.write_part(part, &lease, hashes);
        }
        Self::granted(&lease).len()
    }

    pub fn lookup(&self, hashes: &[Hash]) -> ReadLease {
        self.scheduler.lookup(&self.namespace, hashes, &patience()).unwrap()
    }

    /// Blocks of a chain that are hit, every part's bytes checked; panics on wrong bytes.
    pub fn hit(&self, hashes: &[Hash]) -> usize {
        let lease = self.lookup(hashes);
        let run = lease.group(0).unwrap();
        for (part, (worker, joined)) in self.workers.iter().enumerate() {
            let places = worker.parts_at(joined, 0, &run.slots).unwrap();
            for (index, offset) in places.offsets.iter().enumerate() {
                let mut bytes = vec![0; places.bytes as usize];
                places.arena.read(*offset, &mut bytes);
                let right = fill(&hashes[index], part as u16);
                assert!(bytes.iter().all(|&b| b == right), "block {index} part {part} holds another block's bytes");
            }
            assert!(worker.check(&run.slots, &run.words).unwrap().into_iter().all(|ok| ok));
        }
        run.slots.len()
    }

    pub fn stats(&self) -> Value {
        serde_json::from_str(&self.scheduler.stats(&patience()).unwrap()).unwrap()
    }

    pub fn stat(&self, name: &str) -> u64 {
        self.stats()[name].as_u64().unwrap_or_else(|| panic!("there is no counter {name}"))
    }
}

/// A server in this process with everything of it in `dir`'s name.
pub fn server(name: &str, dir: &Path, size: u64, chunk: u64) -> kvmp_server::Server {
    let server = kvmp_server::Server::builder()
        .size(size)
        .chunk(chunk)
        .name(name)
        .socket(&dir.join("kvmp.sock"))
        .tcp("off")
        .ephemeral(true)
        .start()
        .unwrap();
    let tool = connect(&server.endpoint(), &ConnectOptions::new(Role::Tool));
    until("the arena is backed", || {
        let stats: Value = serde_json::from_str(&tool.stats(&patience()).unwrap()).unwrap();
        stats["warming"] == json!(false)
    });
    server
}
