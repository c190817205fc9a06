//! The real binary under load of real clients, killed with SIGKILL at random instants, also while it starts: after each
//! restart every byte of every hit is its block's.
//!
//! `KVMP_SERVER_KILLS` makes it more kills, `KVMP_SEED` the same calls and delays again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(dead_code, reason = "each test binary uses its share of `support`")]

mod support;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use kvmp_client::{Client, ClientError, ConnectOptions, ReadLease, ReserveList, WriteLease};
use kvmp_core::namespace::NamespaceSpec;
use kvmp_core::segment::SegmentHeader;
use kvmp_core::wire::Role;

use support::house::House;
use support::served::Served;
use support::{Engine, Hash, chain, patience, spec, until};

const KILLS: u64 = 36;
const CLIENTS: u64 = 3;
/// Chains of `BLOCKS` blocks: more than the arena holds.
const CHAINS: u64 = 40;
const BLOCKS: usize = 40;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 29)) % n
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// The number before `what` in a server's log.
fn said(log: &str, what: &str) -> u64 {
    log.split(what).next().unwrap().trim_end().rsplit(' ').next().unwrap().parse().unwrap_or(0)
}

/// The bytes of a block's part: no other's at any place.
fn bytes(hash: &Hash, part: usize, len: u64) -> Vec<u8> {
    let seed = hash.map(|byte| byte ^ (part as u8) << 7);
    seed.iter().copied().cycle().take(len as usize).collect()
}

fn attach(endpoint: &str, spec: &NamespaceSpec) -> Result<Engine, ClientError> {
    let connect = |options: &ConnectOptions| Client::connect(endpoint, options, &patience());
    let scheduler = connect(&ConnectOptions::new(Role::Scheduler))?;
    let namespace = scheduler.open(spec, &patience())?;
    let mut engine = Engine { scheduler, namespace, workers: Vec::new() };
    for (part, of) in (0u16..).zip(&spec.parts) {
        let worker = connect(&engine.worker_options(part))?;
        let joined = worker.join(engine.namespace.id(), engine.namespace.digest(), &of.layout, &patience())?;
        engine.workers.push((worker, joined));
    }
    Ok(engine)
}

/// A lease on what is not there yet of a chain; cancelled when dropped, unless it was handed over.
fn reserve(engine: &Engine, hashes: &[Hash]) -> Result<WriteLease, ClientError> {
    let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
    engine.scheduler.reserve(&engine.namespace, &list, &patience())
}

/// Stores what is not there yet of a chain; how many blocks.
fn store(engine: &Engine, hashes: &[Hash]) -> Result<u64, ClientError> {
    let mut lease = reserve(engine, hashes)?;
    lease.hand_over();
    let granted = Engine::granted(&lease);
    let (slots, words): (Vec<u32>, Vec<u64>) = granted.iter().map(|granted| (granted.1, granted.2)).unzip();
    for (part, (worker, joined)) in engine.workers.iter().enumerate() {
        let places = worker.parts_at(joined, 0, &slots)?;
        for ((index, ..), offset) in granted.iter().zip(&places.offsets) {
            places.arena.write(*offset, &bytes(&hashes[*index], part, places.bytes));
        }
        worker.commit(lease.lease_id(), &slots, &words, None, &patience())?;
    }
    Ok(granted.len() as u64)
}

/// A hit that was loaded once: its bytes may be asked for again, whatever became of the server.
struct Read {
    hashes: Vec<Hash>,
    lease: ReadLease,
}

/// Loads a run as a worker does; how many blocks passed the word check. Those must have the right bytes.
fn load(engine: &Engine, read: &Read) -> Result<u64, ClientError> {
    let run = read.lease.group(0).unwrap();
    let mut passed = 0;
    for (part, (worker, joined)) in engine.workers.iter().enumerate() {
        let places = worker.parts_at(joined, 0, &run.slots)?;
        let mut loaded = vec![vec![0; places.bytes as usize]; run.slots.len()];
        loaded.iter_mut().zip(&places.offsets).for_each(|(bytes, offset)| places.arena.read(*offset, bytes));
        let checked = worker.check(&run.slots, &run.words)?;
        for (index, _) in checked.iter().enumerate().filter(|(_, ok)| **ok) {
            let right = bytes(&read.hashes[index], part, places.bytes);
            assert!(loaded[index] == right, "block {index}, part {part} holds another block's bytes");
            passed += 1;
        }
    }
    Ok(passed)
}

fn look_up(engine: &Engine, hashes: &[Hash]) -> Result<Read, ClientError> {
    let lease = engine.scheduler.lookup(&engine.namespace, hashes, &patience())?;
    Ok(Read { hashes: hashes.to_vec(), lease })
}

/// What a client did until the server was gone.
#[derive(Default)]
struct Done {
    calls: u64,
    stored: u64,
    last: Option<(Engine, Option<Read>)>,
}

fn work(engine: &Engine, random: &mut Random, done: &mut Done, last: &mut Option<Read>) -> Result<(), ClientError> {
    loop {
        let hashes = chain(random.below(CHAINS) as u8, 1 + random.below(BLOCKS as u64) as usize);
        match random.below(4) {
            0 => drop(reserve(engine, &hashes)?),
            1 | 2 => done.stored += store(engine, &hashes)?,
            _ => {
                let read = look_up(engine, &hashes)?;
                load(engine, &read)?;
                *last = Some(read);
            }
        }
        done.calls += 1;
    }
}

/// A client's life with one server.
fn client(endpoint: &str, spec: &NamespaceSpec, seed: u64) -> Done {
    let (mut done, mut last) = (Done::default(), None);
    if let Ok(engine) = attach(endpoint, spec) {
        let error = work(&engine, &mut Random(seed), &mut done, &mut last).unwrap_err();
        assert!(matches!(error, ClientError::Lost(_)), "{error}");
        done.last = Some((engine, last));
    }
    done
}

/// Looks every chain up and checks every byte that is there; how many parts of blocks.
fn check_all(endpoint: &str, spec: &NamespaceSpec) -> u64 {
    let engine = attach(endpoint, spec).unwrap();
    let chains = (0..CHAINS).map(|seed| look_up(&engine, &chain(seed as u8, BLOCKS)).unwrap());
    chains.map(|read| load(&engine, &read).unwrap()).sum()
}

/// What all lives of the server came to.
#[derive(Default, Debug)]
struct Tally {
    calls: u64,
    stored: u64,
    /// Parts of blocks whose bytes were checked after a restart.
    checked: u64,
    /// The same, under leases of the server before.
    read_again: u64,
    kept: u64,
    held_back: u64,
    killed_at_start: u64,
    /// After the recovery had begun and before it was done.
    killed_in_recovery: u64,
}

struct Kills {
    house: House,
    spec: NamespaceSpec,
    random: Random,
    tally: Tally,
    /// Clients of the server before: they still have its leases and the mapping.
    old: Vec<Done>,
}

impl Kills {
    fn one(&mut self, kill: u64) {
        match kill % 4 {
            1 => self.kill_in_recovery(),
            3 => self.kill_at_start(),
            _ => {}
        }
        let server = self.house.start(&[]);
        let log = server.log();
        assert!(kill == 0 || log.contains("blocks kept"), "started empty: {log}");
        self.tally.kept += said(&log, " blocks kept");
        self.tally.held_back += said(&log, " held back");
        for (engine, read) in self.old.drain(..).filter_map(|done| done.last) {
            self.tally.read_again += read.map_or(0, |read| load(&engine, &read).unwrap());
        }
        self.tally.checked += check_all(&self.house.endpoint(), &self.spec);
        self.kill_under_load(server);
    }

    /// Never twice in a row: a third recovery that did not finish starts empty.
    fn kill_at_start(&mut self) {
        let mut server = self.house.spawn(&[]);
        std::thread::sleep(Duration::from_micros(self.random.below(15_000)));
        server.kill();
        self.tally.killed_at_start += 1;
        self.tally.killed_in_recovery += self.recoveries_begun();
    }

    /// Killed as soon as the file says that its recovery has begun; again, if it was faster.
    fn kill_in_recovery(&mut self) {
        until("a kill falls into a recovery", || {
            let mut server = self.house.spawn(&[]);
            while self.recoveries_begun() == 0 && !server.log().contains("ready:") {
                assert!(server.is_running(), "{}", server.log());
            }
            server.kill();
            self.recoveries_begun() > 0
        });
        self.tally.killed_in_recovery += 1;
    }

    /// And not finished, as the segment's header counts them.
    fn recoveries_begun(&self) -> u64 {
        let mut bytes = [0; SegmentHeader::BYTES];
        self.house.file().read_exact_at(&mut bytes, 0).unwrap();
        SegmentHeader::parse(&bytes).unwrap().recoveries_begun
    }

    fn kill_under_load(&mut self, mut server: Served) {
        let (endpoint, spec) = (self.house.endpoint(), &self.spec);
        let seeds: Vec<u64> = (0..CLIENTS).map(|_| self.random.below(u64::MAX)).collect();
        let delay = Duration::from_micros(5_000 + self.random.below(120_000));
        self.old = std::thread::scope(|scope| {
            let start = |seed| {
                scope.spawn({
                    let endpoint = &endpoint;
                    move || client(endpoint, spec, seed)
                })
            };
            let clients: Vec<_> = seeds.into_iter().map(start).collect();
            std::thread::sleep(delay);
            server.kill();
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        self.tally.calls += self.old.iter().map(|done| done.calls).sum::<u64>();
        self.tally.stored += self.old.iter().map(|done| done.stored).sum::<u64>();
    }
}

#[test]
fn a_server_killed_under_load_serves_every_block_with_its_own_bytes() {
    let seed = number("KVMP_SEED").unwrap_or_else(|| std::process::id().into());
    let (spec, tally) = (spec("m", &[9000, 7000]), Tally::default());
    let mut kills = Kills { house: House::new(), spec, random: Random(seed), tally, old: Vec::new() };
    (0..number("KVMP_SERVER_KILLS").unwrap_or(KILLS)).for_each(|kill| kills.one(kill));
    let tally = kills.tally;
    println!("KVMP_SEED={seed}: {tally:?}");
    let least = [
        tally.calls,
        tally.stored,
        tally.checked,
        tally.read_again,
        tally.kept,
        tally.held_back,
        tally.killed_in_recovery,
    ];
    assert!(least.into_iter().all(|n| n > 0), "{tally:?}");
}
