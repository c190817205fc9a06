//! `kvmp serve --upgrade` while it waits for the other server: it may be told to stop, and its time is the other's.

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::load::filled;
use crate::served::House;
use crate::support::{chain, until};
use crate::upgrade::other_make;

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
