//! Readers of a part that another process writes: they load it, and nobody waits for them.

use kvmp_client::{Client, ConnectOptions};
use kvmp_core::ring::{COMPLETIONS, Consumer};
use kvmp_core::wire::{
    ClientMessage, Code, Completion, FEATURE_READERS, Hello, Op, Role, ServerMessage, Submission, send,
};

use crate::puppet::{Answer, Ask, Grant, Puppet};
use crate::raw::{Raw, dial};
use crate::serve::Serve;
use crate::support::{chain, connect, patience, until};
use crate::theatre::{Cast, PARTS, Theatre};

const SEED: u8 = 10;

/// An engine of which blocks 0 to 3 are stored, 4 to 7 half, 8 to 11 not at all; part 0 has two readers beside its writer.
struct Scene {
    theatre: Theatre,
    cast: Cast,
    readers: Vec<Puppet>,
    /// Blocks 0 to 3, as a lookup finds them.
    found: Grant,
}

impl Scene {
    fn set(name: &str) -> Self {
        let theatre = Theatre::with(Serve::start(name));
        let endpoint = theatre.server.endpoint();
        let scheduler = Puppet::scheduler(&endpoint, &PARTS);
        // The first is there before there is a writer, the second joins beside it.
        let mut readers = vec![Puppet::reader(&endpoint, &PARTS, scheduler.token, 0)];
        let workers = (0..2).map(|part| Puppet::worker(&endpoint, &PARTS, scheduler.token, part)).collect();
        readers.push(Puppet::reader(&endpoint, &PARTS, scheduler.token, 0));
        let mut cast = Cast { scheduler, workers };
        cast.store_in_part(SEED);
        let lease = theatre.bystanders[0].lookup(&chain(SEED, 12));
        let run = lease.group(0).unwrap();
        let slots = run.slots.iter().zip(&run.words).enumerate().map(|(i, (slot, word))| (i, *slot, *word)).collect();
        let found = Grant { lease: 0, seed: SEED, slots };
        assert_eq!((found.slots.len(), theatre.stat("blocks_writing")), (4, 8));
        Self { theatre, cast, readers, found }
    }

    fn readers_go_on(&mut self) {
        for reader in &mut self.readers {
            assert_eq!(reader.count(&Ask::Read(self.found.clone())), 4);
        }
    }

    fn join(&self, role: Role) -> Result<Client, String> {
        let token = Some(self.cast.scheduler.token);
        let options = ConnectOptions { engine_token: token, part: Some(0), ..ConnectOptions::new(role) };
        Client::connect(&self.theatre.server.endpoint(), &options, &patience()).map_err(|error| error.to_string())
    }

    fn kill_workers(&mut self) {
        self.cast.workers.iter_mut().for_each(Puppet::kill);
    }
}

#[test]
fn what_a_dead_writer_had_open_comes_back_while_its_readers_live_and_they_go_on() {
    let mut scene = Scene::set("readers-writer");
    scene.readers_go_on();
    scene.readers[0].freeze();
    scene.kill_workers();
    until("the slots come back", || scene.theatre.unsettled() == 0);
    assert_eq!(scene.theatre.hit(SEED, 12), 4);
    scene.readers[0].signal(rustix::process::Signal::CONT);
    scene.readers_go_on();
    // The part is barred to writers, not to readers.
    assert!(scene.join(Role::Worker).unwrap_err().contains("attach anew"));
    scene.join(Role::Reader).unwrap();
}

#[test]
fn a_part_that_only_readers_joined_for_closes_with_its_scheduler_and_the_engine_is_forgotten() {
    let theatre = Theatre::with(Serve::start("readers-unjoined"));
    let endpoint = theatre.server.endpoint();
    let mut scheduler = Puppet::scheduler(&endpoint, &PARTS);
    let readers: Vec<Puppet> = (0..2).map(|part| Puppet::reader(&endpoint, &PARTS, scheduler.token, part)).collect();
    assert_eq!(scheduler.reserve(SEED, 12).slots.len(), 12);
    assert_eq!((theatre.unsettled(), theatre.stat("engines"), theatre.stat("sessions")), (12, 3, 9));
    scheduler.kill();
    until("the slots come back", || theatre.unsettled() == 0);
    until("the engine is forgotten", || theatre.stat("engines") == 2);
    assert_eq!(theatre.stat("sessions"), 8, "both readers live");
    let token = Some(scheduler.token);
    let late = ConnectOptions { engine_token: token, part: Some(0), ..ConnectOptions::new(Role::Reader) };
    let refused = Client::connect(&endpoint, &late, &patience()).unwrap_err().to_string();
    assert!(refused.contains("cannot be joined"), "{refused}");
    drop(readers);
}

#[test]
fn after_a_restart_slots_do_not_wait_for_readers() {
    let mut scene = Scene::set("readers-restart");
    // Frozen, so that they keep their entries; and the server, so that it is the next one that has to find out.
    scene.readers.iter().for_each(Puppet::freeze);
    scene.theatre.server.freeze();
    scene.cast.scheduler.kill();
    scene.kill_workers();
    scene.theatre.restart();
    assert_eq!(scene.theatre.stat("blocks_quarantined"), 8);
    until("the slots come back", || scene.theatre.unsettled() == 0);
    for reader in &scene.readers {
        reader.signal(rustix::process::Signal::CONT);
    }
    // On the same inode: what was found is still there.
    scene.readers_go_on();
}

#[test]
fn a_reader_commits_and_aborts_nothing() {
    let mut scene = Scene::set("readers-forbidden");
    let grant = scene.found.clone();
    for ask in [Ask::Commit(grant.clone()), Ask::Abort(grant)] {
        let Answer::Failed(why) = scene.readers[0].ask(&ask) else { panic!("a reader wrote") };
        assert!(why.contains("it is a reader"), "{why}");
    }
    // Nor one whose client does not look.
    for op in [Op::Commit, Op::Abort, Op::Reserve, Op::Lookup, Op::Clear] {
        assert_eq!(answered(&mut reader_without_manners(&scene), op), Code::Forbidden as u16, "{op:?}");
    }
    assert_eq!((scene.theatre.unsettled(), scene.theatre.hit(SEED, 12)), (8, 4));
}

fn reader_without_manners(scene: &Scene) -> Raw {
    let socket = dial(&scene.theatre.server.socket());
    let (engine_token, pid) = (Some(scene.cast.scheduler.token), std::process::id());
    let hello = Hello { role: Role::Reader, pid, engine_token, part: Some(0), dma: false, features: vec![] };
    send(&socket, &ClientMessage::Hello(hello), &[]).unwrap();
    Raw::welcomed(socket)
}

fn answered(raw: &mut Raw, op: Op) -> u16 {
    raw.submit(Submission { request: 1, op: op as u8, ..Submission::default() });
    let mut completions = Consumer::new(raw.ring.queue(COMPLETIONS));
    let mut got = None;
    until("an answer", || {
        got = completions.pop().unwrap();
        got.is_some()
    });
    Completion::from_entry(got.unwrap()).code
}

#[test]
fn a_server_says_which_features_both_know() {
    let server = Serve::start("readers-feature");
    let client = connect(&server.endpoint(), &ConnectOptions::new(Role::Tool));
    assert_eq!(client.features(), [FEATURE_READERS]);
    let socket = dial(&server.socket());
    let features = vec!["of another time".to_owned()];
    let hello = Hello { role: Role::Tool, pid: 1, engine_token: None, part: None, dma: false, features };
    send(&socket, &ClientMessage::Hello(hello), &[]).unwrap();
    let (message, _) = kvmp_core::wire::receive::<ServerMessage>(&socket).unwrap();
    assert!(matches!(&message, ServerMessage::Welcome(welcome) if welcome.features.is_empty()), "{message:?}");
}
