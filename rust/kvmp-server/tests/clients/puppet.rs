//! A client in a process of its own, told over its standard input what to do: `spawned -> ready -> (asked -> answered)*`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmp_client::{Bound, Client, ConnectOptions, Namespace, PartsAt, ReadLease, ReserveList, WriteLease};
use kvmp_core::wire::Role;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::serve::is_stopped;
use crate::support::served::goes_on_without_this;
use crate::support::{Engine, chain, connect, fill, patience, spec, until};

/// What a puppet plays; it goes to the child in its environment.
#[derive(Clone, Serialize, Deserialize)]
pub struct Part {
    pub endpoint: String,
    /// Bytes of each part of the namespace.
    pub parts: Vec<u64>,
    /// A worker's engine and part; a scheduler has none.
    pub worker: Option<(u64, u16)>,
    /// A worker that only loads its part.
    pub reads: bool,
}

/// Slots of a chain's blocks: (index of the block, slot, word).
#[derive(Clone, Serialize, Deserialize)]
pub struct Grant {
    pub lease: u64,
    pub seed: u8,
    pub slots: Vec<(usize, u32, u64)>,
}

impl Grant {
    /// The grant of some of its blocks only.
    pub fn of(&self, blocks: std::ops::Range<usize>) -> Self {
        Self { slots: self.slots.iter().filter(|slot| blocks.contains(&slot.0)).copied().collect(), ..self.clone() }
    }

    pub fn slots(&self) -> Vec<u32> {
        self.slots.iter().map(|slot| slot.1).collect()
    }
}

#[derive(Serialize, Deserialize)]
pub enum Ask {
    /// Scheduler: blocks of a chain; the lease is handed over and kept.
    Reserve(u8, usize),
    /// Scheduler: a hit, whose lease is kept.
    Lookup(u8, usize),
    /// Scheduler: lets go of every lease, as one does whose requests were aborted.
    Abandon,
    /// Worker: the right bytes.
    Write(Grant),
    Commit(Grant),
    Abort(Grant),
    /// Worker: how many of these blocks have the right bytes, and had their words until they were read.
    Read(Grant),
    /// Worker: a copy that goes on and on, of bytes that are nobody's, until `Calm`.
    Storm(Grant),
    Calm,
    /// Hangs up; a copy goes on.
    Close,
    /// Forks: the child tries the client and lives on until standard input ends.
    Fork,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Ready {
        token: u64,
    },
    Granted(u64, Vec<(usize, u32, u64)>),
    Count(u64),
    Failed(String),
    /// The child's pid, and how its try failed.
    Forked(u32, String),
}

/// The parent's end.
pub struct Puppet {
    child: Child,
    input: ChildStdin,
    answers: Receiver<Answer>,
    pub token: u64,
}

const PART: &str = "KVMP_TEST_PUPPET";

impl Puppet {
    pub fn scheduler(endpoint: &str, parts: &[u64]) -> Self {
        Self::spawn(&Part { endpoint: endpoint.into(), parts: parts.to_vec(), worker: None, reads: false })
    }

    pub fn worker(endpoint: &str, parts: &[u64], token: u64, part: u16) -> Self {
        Self::joined(endpoint, parts, (token, part), false)
    }

    pub fn reader(endpoint: &str, parts: &[u64], token: u64, part: u16) -> Self {
        Self::joined(endpoint, parts, (token, part), true)
    }

    fn joined(endpoint: &str, parts: &[u64], worker: (u64, u16), reads: bool) -> Self {
        Self::spawn(&Part { endpoint: endpoint.into(), parts: parts.to_vec(), worker: Some(worker), reads })
    }

    fn spawn(part: &Part) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "puppet::plays", "--ignored", "--nocapture"])
            .env(PART, serde_json::to_string(part).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        goes_on_without_this(&mut command);
        let mut child = command.spawn().unwrap();
        let (sender, answers) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            let said = lines.map_while(Result::ok).filter_map(|line| Some(line.strip_prefix('@')?.to_owned()));
            said.for_each(|line| drop(sender.send(serde_json::from_str(&line).unwrap())));
        });
        let input = child.stdin.take().unwrap();
        let mut this = Self { child, input, answers, token: 0 };
        let Answer::Ready { token } = this.hear() else { panic!("a puppet is not ready") };
        this.token = token;
        this
    }

    pub fn hear(&mut self) -> Answer {
        self.answers.recv_timeout(Duration::from_secs(30)).unwrap()
    }

    pub fn ask(&mut self, ask: &Ask) -> Answer {
        writeln!(self.input, "{}", serde_json::to_string(ask).unwrap()).unwrap();
        self.hear()
    }

    /// Asks for what is answered by a number.
    pub fn count(&mut self, ask: &Ask) -> u64 {
        match self.ask(ask) {
            Answer::Count(count) => count,
            other => panic!("{other:?}"),
        }
    }

    pub fn reserve(&mut self, seed: u8, blocks: usize) -> Grant {
        match self.ask(&Ask::Reserve(seed, blocks)) {
            Answer::Granted(lease, slots) => Grant { lease, seed, slots },
            other => panic!("{other:?}"),
        }
    }

    /// The right bytes, then the commit.
    pub fn store(&mut self, grant: &Grant) {
        self.count(&Ask::Write(grant.clone()));
        assert_eq!(self.count(&Ask::Commit(grant.clone())), grant.slots.len() as u64);
    }

    /// Again is harmless.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops it, and waits until the kernel says that every thread of it is stopped.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        until("it is stopped", || is_stopped(self.child.id()));
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "started by other tests, in a process of its own"]
fn plays() {
    let Ok(part) = std::env::var(PART) else { return };
    let part: Part = serde_json::from_str(&part).unwrap();
    let mut actor = Actor::new(&part);
    say(&Answer::Ready { token: actor.client.engine_token() });
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let answer = actor.act(serde_json::from_str(&line).unwrap());
        say(&answer.unwrap_or_else(|error| Answer::Failed(error.to_string())));
    }
}

/// On a line of its own: the harness may have begun one.
fn say(answer: &Answer) {
    println!("\n@{}", serde_json::to_string(answer).unwrap());
}

/// The child's end.
struct Actor {
    client: Client,
    namespace: Namespace,
    reads: Vec<ReadLease>,
    writes: Vec<WriteLease>,
    storm: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

type Done<T> = Result<T, kvmp_client::ClientError>;

impl Actor {
    fn new(part: &Part) -> Self {
        let spec = spec("m", &part.parts);
        let options = match part.worker {
            None => ConnectOptions::new(Role::Scheduler),
            Some((token, own)) => {
                let role = if part.reads { Role::Reader } else { Role::Worker };
                ConnectOptions { engine_token: Some(token), part: Some(own), ..ConnectOptions::new(role) }
            }
        };
        let client = connect(&part.endpoint, &options);
        let namespace = match part.worker {
            None => client.open(&spec, &patience()).unwrap(),
            Some((_, own)) => {
                let listed = client.namespaces().unwrap();
                let found = listed.iter().find(|listed| listed.spec == spec.canonical_json()).unwrap();
                let layout = &spec.parts[usize::from(own)].layout;
                client.join(found.id, &found.digest, layout, &patience()).unwrap()
            }
        };
        Self { client, namespace, reads: Vec::new(), writes: Vec::new(), storm: None }
    }

    fn act(&mut self, ask: Ask) -> Done<Answer> {
        let count = match ask {
            Ask::Reserve(seed, blocks) => return self.reserve(&chain(seed, blocks)),
            Ask::Lookup(seed, blocks) => self.lookup(&chain(seed, blocks))?,
            Ask::Abandon => (self.reads.drain(..).count() + self.writes.drain(..).count()) as u64,
            Ask::Write(grant) => self.write(&grant)?,
            Ask::Commit(grant) => {
                let (slots, words) = slots_and_words(&grant);
                u64::from(self.client.commit(grant.lease, &slots, &words, None, &patience())?)
            }
            Ask::Abort(grant) => {
                let (slots, words) = slots_and_words(&grant);
                u64::from(self.client.abort(grant.lease, &slots, &words, &patience())?)
            }
            Ask::Read(grant) => self.read(&grant)?,
            Ask::Storm(grant) => self.storm(&grant)?,
            Ask::Calm => self.calm(),
            Ask::Close => {
                self.client.close();
                0
            }
            Ask::Fork => return Ok(self.fork()),
        };
        Ok(Answer::Count(count))
    }

    fn reserve(&mut self, hashes: &[crate::support::Hash]) -> Done<Answer> {
        let list = ReserveList { hashes, first_block: 0, parent: None, group: 0 };
        let mut lease = self.client.reserve(&self.namespace, &list, &patience())?;
        lease.hand_over();
        let answer = Answer::Granted(lease.lease_id(), Engine::granted(&lease));
        self.writes.push(lease);
        Ok(answer)
    }

    fn lookup(&mut self, hashes: &[crate::support::Hash]) -> Done<u64> {
        let lease = self.client.lookup(&self.namespace, hashes, &patience())?;
        let blocks = lease.group(0).unwrap().slots.len() as u64;
        self.reads.push(lease);
        Ok(blocks)
    }

    fn places(&self, grant: &Grant) -> Done<PartsAt> {
        self.client.parts_at(&self.namespace, 0, &slots_and_words(grant).0)
    }

    fn write(&self, grant: &Grant) -> Done<u64> {
        let (places, part) = (self.places(grant)?, self.client.part().unwrap());
        let hashes = chain(grant.seed, 256);
        for ((index, ..), offset) in grant.slots.iter().zip(&places.offsets) {
            places.arena.write(*offset, &vec![fill(&hashes[*index], part); places.bytes as usize]);
        }
        Ok(places.offsets.len() as u64)
    }

    fn read(&self, grant: &Grant) -> Done<u64> {
        let (places, part) = (self.places(grant)?, self.client.part().unwrap());
        let (hashes, mut right) = (chain(grant.seed, 256), Vec::new());
        for ((index, ..), offset) in grant.slots.iter().zip(&places.offsets) {
            let mut bytes = vec![0; places.bytes as usize];
            places.arena.read(*offset, &mut bytes);
            right.push(bytes.iter().all(|&byte| byte == fill(&hashes[*index], part)));
        }
        let (slots, words) = slots_and_words(grant);
        let whole = self.client.check(&slots, &words)?;
        Ok(right.into_iter().zip(whole).filter(|both| *both == (true, true)).count() as u64)
    }

    fn storm(&mut self, grant: &Grant) -> Done<u64> {
        let places = self.places(grant)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, count) = (Arc::clone(&stop), places.offsets.len() as u64);
        let thread = std::thread::spawn(move || {
            for round in 0u64.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let bytes = round.to_le_bytes().repeat(places.bytes as usize / 8);
                places.offsets.iter().for_each(|offset| places.arena.write(*offset, &bytes));
            }
        });
        self.storm = Some((stop, thread));
        Ok(count)
    }

    fn calm(&mut self) -> u64 {
        let Some((stop, thread)) = self.storm.take() else { return 0 };
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        1
    }

    fn fork(&self) -> Answer {
        // Read by the child without a lock that another thread may have held when it was made.
        let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
        // SAFETY: the child calls into this client, which must refuse it before it takes a lock, writes to a pipe, and
        // waits for the end of standard input.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let tried = self.client.ping(&Bound::ms(60_000)).err().map(|error| error.to_string());
            let _ = to_parent.write_all(format!("{}\n", tried.unwrap_or_default()).as_bytes());
            drop(to_parent);
            while rustix::io::read(std::io::stdin(), &mut [0u8; 64]).is_ok_and(|bytes| bytes > 0) {}
            // SAFETY: ends the child without the harness's exit handlers.
            unsafe { libc::_exit(0) };
        }
        drop(to_parent);
        let mut text = String::new();
        BufReader::new(&mut from_child).read_line(&mut text).unwrap();
        Answer::Forked(pid as u32, text.trim().to_owned())
    }
}

fn slots_and_words(grant: &Grant) -> (Vec<u32>, Vec<u64>) {
    grant.slots.iter().map(|&(_, slot, word)| (slot, word)).unzip()
}
