//! Clients that use up what the server can give: holder entries, descriptors, callers of the rendezvous. Sessions that
//! stand go on, new ones are told, and all is well when they leave.

use std::io::Read;
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use kvmp_client::{Client, ClientError, ConnectOptions};
use kvmp_core::segment::{HOLDERS, LockKind, holder_offset, try_lock};
use kvmp_core::wire::Role;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::footprint::Footprint;
use crate::raw::{Raw, dial};
use crate::serve::Serve;
use crate::support::{chain, connect, patience, until};
use crate::theatre::Theatre;

fn attach(theatre: &Theatre) -> Result<Client, ClientError> {
    Client::connect(&theatre.server.endpoint(), &ConnectOptions::new(Role::Scheduler), &patience())
}

fn house(name: &str) -> Theatre {
    let theatre = Theatre::open(name);
    assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
    theatre
}

#[test]
fn without_holder_entries_new_sessions_are_refused_by_name() {
    let theatre = house("entries");
    let raw = Raw::attach(&theatre.server.socket(), Role::Scheduler);
    // One lock on each run of entries that nobody holds: the first seven are the bystanders' and this client's own.
    let (free, len) = (holder_offset(7), holder_offset(HOLDERS) - holder_offset(7));
    assert!(try_lock(&raw.segment, LockKind::Exclusive, free, len).unwrap());
    let refused = attach(&theatre).unwrap_err().to_string();
    assert!(refused.contains("all 4,096 holder entries are held"), "{refused}");
    assert_eq!(theatre.hit(1, 20), 20);
    drop(raw);
    attach(&theatre).unwrap();
}

#[test]
fn without_descriptors_sessions_that_stand_go_on() {
    let theatre = house("descriptors-gone");
    let before = Footprint::from_now(&theatre.server);
    let pid = Pid::from_raw(theatre.server.pid() as i32).unwrap();
    let room = before.fds as u64 + 40;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let had = prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(room), maximum }).unwrap();
    assert_eq!(had.current, maximum, "the server raises its limit");
    let crowd: Vec<OwnedFd> = (0..200).map(|_| dial(&theatre.server.socket())).collect();
    until("it runs out", || theatre.server.logged("a connection could not be accepted") > 0);
    assert_eq!((theatre.hit(1, 20), theatre.bystanders[1].store(&chain(2, 20))), (20, 20));
    drop(crowd);
    until("there is room again", || attach(&theatre).is_ok());
    before.is_back(&theatre.server);
}

/// Who says nothing is answered nothing, for half a second; there are at most 64 of them.
#[test]
fn callers_of_the_rendezvous_that_say_nothing_are_let_go() {
    let theatre = Theatre::with(Serve::with_tcp("tcp"));
    let before = Footprint::from_now(&theatre.server);
    let address = theatre.server.tcp();
    let mut silent: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(&address).unwrap()).collect();
    assert_eq!(theatre.bystanders[0].store(&chain(1, 20)), 20);
    assert!(Footprint::of(&theatre.server).threads <= before.threads + 65);
    for stream in &mut silent {
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "hung up on");
    }
    before.is_back(&theatre.server);
    let found = format!("tcp://{address}");
    until("the next one is told", || Client::connect(&found, &ConnectOptions::new(Role::Tool), &patience()).is_ok());
    drop(connect(&found, &ConnectOptions::new(Role::Tool)));
    assert_eq!(theatre.hit(1, 20), 20);
}
