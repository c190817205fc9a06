//! An engine of one part whose server may go at any moment: every call may fail, and wrong bytes never pass.

use kvmp_client::{Bound, Client, ClientError, ConnectOptions, KeptArena, Namespace, ReserveList};
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::wire::Role;

use crate::support::{Hash, fill, until};

pub struct Attached {
    pub scheduler: Client,
    pub namespace: Namespace,
    pub worker: Client,
    pub joined: Namespace,
}

fn bound() -> Bound<'static> {
    Bound::ms(10_000)
}

impl Attached {
    pub fn new(endpoint: &str, spec: &NamespaceSpec, keep: Option<KeptArena>) -> Result<Self, ClientError> {
        let scheduler = Client::connect(endpoint, &ConnectOptions::new(Role::Scheduler), &bound())?;
        let namespace = scheduler.open(spec, &bound())?;
        let (engine_token, part) = (Some(scheduler.engine_token()), Some(0));
        let options = ConnectOptions { engine_token, part, keep, ..ConnectOptions::new(Role::Worker) };
        let worker = Client::connect(endpoint, &options, &bound())?;
        let joined = worker.join(namespace.id(), namespace.digest(), &spec.parts[0].layout, &bound())?;
        Ok(Self { scheduler, namespace, worker, joined })
    }

    /// Attaches as an engine does that has lost its server: again and again, with the mapping of before.
    pub fn again(&self, endpoint: &str) -> Self {
        let spec = self.namespace.spec().clone();
        let mut attached = None;
        until("it attaches again", || {
            attached = Self::new(endpoint, &spec, self.worker.keep_arena()).ok();
            attached.is_some()
        });
        attached.unwrap()
    }

    /// Where the arena is mapped.
    pub fn mapping(&self) -> usize {
        self.worker.arena().unwrap().as_ptr().addr()
    }

    /// Stores what is not there of a chain; how many blocks were taken.
    pub fn store(&self, hashes: &[Hash]) -> Result<u32, ClientError> {
        let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
        let mut lease = self.scheduler.reserve(&self.namespace, &list, &bound())?;
        lease.hand_over();
        let granted: Vec<(usize, u32, u64)> = crate::support::Engine::granted(&lease);
        let slots: Vec<u32> = granted.iter().map(|g| g.1).collect();
        let words: Vec<u64> = granted.iter().map(|g| g.2).collect();
        let places = self.worker.parts_at(&self.joined, 0, &slots)?;
        for ((index, ..), offset) in granted.iter().zip(&places.offsets) {
            places.arena.write(*offset, &vec![fill(&hashes[*index], 0); places.bytes as usize]);
        }
        self.worker.commit(lease.lease_id(), &slots, &words, None, &bound())
    }

    /// Blocks of a chain that are hit and whose words held until they were read; panics on another block's bytes.
    pub fn hit(&self, hashes: &[Hash]) -> Result<usize, ClientError> {
        let lease = self.scheduler.lookup(&self.namespace, hashes, &bound())?;
        let run = lease.group(0).unwrap();
        let places = self.worker.parts_at(&self.joined, 0, &run.slots)?;
        let right = places.offsets.iter().enumerate().map(|(index, offset)| {
            let mut bytes = vec![0; places.bytes as usize];
            places.arena.read(*offset, &mut bytes);
            bytes.iter().all(|&b| b == fill(&hashes[index], 0))
        });
        let right: Vec<bool> = right.collect();
        let held = self.worker.check(&run.slots, &run.words)?;
        let wrong = right.iter().zip(&held).filter(|(right, held)| **held && !**right).count();
        assert_eq!(wrong, 0, "blocks of another key's bytes");
        Ok(held.into_iter().filter(|held| *held).count())
    }

    pub fn stats(&self) -> serde_json::Value {
        serde_json::from_str(&self.scheduler.stats(&bound()).unwrap()).unwrap()
    }

    pub fn stat(&self, name: &str) -> u64 {
        self.stats()[name].as_u64().unwrap_or_else(|| panic!("there is no counter {name}"))
    }
}
