//! `kvmp serve --upgrade` while it waits for the other server: it may be told to stop, and its time is the other's.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Signal, kill_process};

use crate::load::filled;
use crate::served::{House, Served};
use crate::support::{chain, until};
use crate::upgrade::{lock_and_listen, other_make};

/// Longer than any test waits.
const FOR_EVER: [&str; 3] = ["--upgrade", "--drain-timeout", "60m"];

#[test]
fn a_start_that_waits_ends_when_told_to_and_leaves_the_other_server_be() {
    let house = House::new();
    let (mut old, engine) = filled(&house, &[]);
    old.freeze();
    let mut watched = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let pid = watched.id().to_string();
    let mut told = house.spawn(&FOR_EVER);
    let mut orphan = house.spawn(&[&FOR_EVER[..], &["--until-pid", &pid]].concat());
    [&told, &orphan].iter().for_each(|start| start.says("waiting for it to go on"));
    told.signal(Signal::TERM);
    watched.kill().unwrap();
    watched.wait().unwrap();
    for (start, why) in [(&mut told, "SIGTERM"), (&mut orphan, &format!("process {pid} ended"))] {
        assert_eq!(start.wait().code(), Some(0), "{}", start.log());
        let words =
            format!("{why}: stopping; the server that has the name 'lifecycle' was not asked to stop and stays");
        assert!(start.log().contains(&words), "{}", start.log());
    }
    old.signal(Signal::CONT);
    assert_eq!(engine.hit(&chain(1, 50)).unwrap(), 50);
    assert!(old.is_running() && !old.log().contains("SIGTERM"), "{}", old.log());
}

#[test]
fn a_start_that_is_told_to_stop_after_it_has_asked_says_what_it_leaves() {
    let house = House::new();
    let mut deaf = other_make(&house, "upgrade::deaf_server");
    let mut start = house.spawn(&FOR_EVER);
    start.says("asking pid");
    start.signal(Signal::INT);
    assert_eq!(start.wait().code(), Some(0), "{}", start.log());
    let words = format!("SIGINT: stopping; pid {}, the server at", deaf.pid());
    assert!(start.log().contains(&words) && start.log().contains("once it has, no server has"), "{}", start.log());
    deaf.says("asked");
    assert!(deaf.is_running());
}

#[test]
fn the_time_to_let_go_begins_when_the_other_server_is_asked() {
    const TIME: Duration = Duration::from_secs(2);
    let house = House::new();
    let (mut old, _engine) = filled(&house, &[]);
    old.freeze();
    let new = house.spawn(&["--upgrade", "--drain-timeout", "2s"]);
    new.says("waiting for it to go on");
    // What passes before it asks is not the other's time.
    new.freeze();
    std::thread::sleep(TIME);
    old.signal(Signal::CONT);
    until("the old one goes on", || old.state() != 'T');
    new.signal(Signal::CONT);
    new.says("ready:");
    assert!(new.log().contains("50 blocks kept"), "{}", new.log());
    assert_eq!(old.wait().code(), Some(0));
}

#[test]
fn a_server_whose_file_was_removed_is_named_and_left() {
    let house = House::new();
    let (mut old, engine) = filled(&house, &[]);
    std::fs::remove_file(house.segment()).unwrap();
    let (code, log) = house.fails(&["--upgrade"]);
    assert!(code == 1 && log.contains(&format!("pid {} answers at", old.pid())), "{log}");
    assert!(log.contains("file was removed") && !log.contains("no server runs"), "{log}");
    assert!(log.contains("another server answers there") && !house.segment().exists(), "{log}");
    assert!(old.is_running() && engine.hit(&chain(1, 50)).unwrap() == 50);
}

#[test]
fn a_stopped_server_that_takes_no_more_connections_is_not_said_to_be_elsewhere() {
    let house = House::new();
    let old = house.start(&[]);
    old.freeze();
    let address = SocketAddrUnix::new(house.socket()).unwrap();
    // Each waits for it also once its own end is closed.
    let knock = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        connect(&socket, &address)
    };
    until("no more may wait", || knock() == Err(Errno::AGAIN));
    let (code, log) = house.fails(&["--upgrade"]);
    assert!(code == 1 && log.contains("leaves so many connections waiting"), "{log}");
    assert!(log.contains(&format!("(pid {}, says its header) go on", old.pid())), "{log}");
    old.signal(Signal::CONT);
}

/// Not a test: a server of another make that ends and leaves socket and lock to a child of its.
#[test]
#[ignore = "run as a process of its own by the test below"]
#[expect(clippy::zombie_processes, reason = "it outlives this process, and the test ends it")]
fn departing_server() {
    let (file, socket) = lock_and_listen();
    for fd in [file.as_fd(), socket.as_fd()] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    }
    let mut heir = Command::new("sleep");
    let heir = heir.arg("60").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eprintln!("deaf, heir {}", heir.id());
}

#[test]
fn a_process_that_cannot_be_asked_is_refused_for_the_right_reason() {
    let house = House::new();
    let mut departed = other_make(&house, "waits::departing_server");
    departed.says("heir");
    assert!(departed.wait().success());
    let log = departed.log();
    let heir = log.split_once("heir ").unwrap().1.lines().next().unwrap().parse().unwrap();
    // Two processes that cannot be asked: one that has ended, and, seen from another pid namespace, one without a pid.
    let start = house.spawn(&["--upgrade"]);
    let serve = house.command_on(&["--upgrade"]);
    let mut elsewhere = Command::new("unshare");
    elsewhere.args(["-rpf", "--kill-child"]).arg(serve.get_program()).args(serve.get_args());
    let elsewhere = Served::spawn(elsewhere);
    let mut starts = [start, elsewhere];
    let codes = starts.each_mut().map(|start| start.wait().code());
    kill_process(Pid::from_raw(heir).unwrap(), Signal::KILL).unwrap();
    let ended = format!("pid {}, which opened the socket at {}, has ended", departed.pid(), house.socket().display());
    let whys = [ended.as_str(), "is not to be seen from this pid namespace"];
    for ((start, code), why) in starts.iter().zip(codes).zip(whys) {
        let log = start.log();
        let is_barred = log.contains("unshare failed") || log.contains("Operation not permitted");
        assert!(is_barred || code == Some(1) && log.contains(why), "{why}: {log}");
    }
}
