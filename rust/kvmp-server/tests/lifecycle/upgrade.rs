//! `kvmp serve --upgrade`: whom it stops, what it keeps, and when it leaves the old server alone.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use kvmp_core::segment::{LockKind, try_lock};
use rustix::process::Signal;

use crate::load::{Load, filled, more_rounds};
use crate::served::{House, Served};
use crate::support::{chain, until};

#[test]
fn engines_under_load_attach_once_and_keep_blocks_and_mapping() {
    let house = House::new();
    let (mut old, engine) = filled(&house, &[]);
    let (epoch, over) = (engine.scheduler.server_epoch(), AtomicBool::new(false));
    let loads = [Load::new(&house, &over), Load::new(&house, &over)];
    let _new = std::thread::scope(|scope| {
        for (seed, load) in [100, 150].into_iter().zip(&loads) {
            scope.spawn(move || load.run(seed));
        }
        more_rounds(&loads, 20);
        let new = house.start(&["--upgrade"]);
        assert_eq!(old.wait().code(), Some(0), "{}", old.log());
        for words in [&format!("asking pid {}", old.pid()), "has let go of the segment", "blocks kept"] {
            assert!(new.log().contains(words), "{words}: {}", new.log());
        }
        until("both attach", || loads.iter().all(|load| load.attaches() == 1));
        more_rounds(&loads, 20);
        let again = engine.again(&house.endpoint());
        assert!(again.hit(&chain(1, 50)).unwrap() == 50 && again.scheduler.server_epoch() != epoch);
        over.store(true, Ordering::Relaxed);
        new
    });
    assert_eq!(loads.map(|load| load.attaches()), [1, 1]);
}

#[test]
fn with_no_server_there_it_starts_as_usual_and_says_so() {
    let house = House::new();
    let mut served = house.start(&["--upgrade"]);
    assert!(served.log().contains("no server runs under the name 'lifecycle'; starting as usual"), "{}", served.log());
    served.kill();
    // Its socket is still there, and nobody behind it.
    let again = house.start(&["--upgrade"]);
    assert!(again.log().contains("starting as usual") && again.log().contains("recovered"), "{}", again.log());
}

#[test]
fn the_file_of_another_layout_is_taken_over_cold() {
    let house = House::new();
    let (mut old, engine) = filled(&house, &[]);
    // As a later version would have written it.
    house.file().write_all_at(&99u32.to_ne_bytes(), 8).unwrap();
    let inode = house.inode();
    let new = house.start(&["--upgrade"]);
    assert_eq!(old.wait().code(), Some(0));
    assert!(new.log().contains("replaced by a new, empty one: segment layout version 99"), "{}", new.log());
    assert_ne!(house.inode(), inode);
    // What the engine had mapped is the old file: it attaches to the new one, and finds nothing.
    let again = engine.again(&house.endpoint());
    assert_ne!(again.scheduler.segment_id(), engine.scheduler.segment_id());
    assert_eq!(again.hit(&chain(1, 50)).unwrap(), 0);
}

#[test]
fn a_server_that_a_signal_has_stopped_is_waited_for_and_not_asked() {
    let house = House::new();
    let (mut old, engine) = filled(&house, &[]);
    old.freeze();
    let (code, log) = house.fails(&["--upgrade", "--drain-timeout", "200ms"]);
    assert!(code == 1 && log.contains(&format!("a signal has stopped pid {}", old.pid())), "{log}");
    assert!(log.contains(&format!("`kill -CONT {}`", old.pid())), "{log}");
    old.signal(Signal::CONT);
    // It was not asked to stop: it serves on.
    assert_eq!(engine.hit(&chain(1, 50)).unwrap(), 50);
    assert!(old.is_running() && !old.log().contains("SIGTERM"), "{}", old.log());
    // Two at once that both wait: one of them has the name in the end, the other is told who.
    old.freeze();
    let mut starts = [house.spawn(&["--upgrade"]), house.spawn(&["--upgrade"])];
    starts.iter().for_each(|start| start.says("waiting for it to go on"));
    old.signal(Signal::CONT);
    assert_eq!(old.wait().code(), Some(0));
    // By what has ended: its last words may still be on their way through the pipe.
    let mut first_ended = None;
    until("one of them gives up", || {
        first_ended = starts.iter_mut().position(|start| !start.is_running());
        first_ended.is_some()
    });
    starts.swap(0, first_ended.unwrap());
    let [loser, winner] = &mut starts;
    winner.says("ready:");
    assert_eq!(loser.wait().code(), Some(1));
    assert!(loser.log().contains(&format!("(pid {}) already runs", winner.pid())), "{}", loser.log());
    assert!(winner.is_running() && winner.log().contains("50 blocks kept"), "{}", winner.log());
}

/// A server of another make: one of the functions that are not tests.
pub fn other_make(house: &House, which: &str) -> Served {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", which]).env("KVMP_TEST_HOUSE", house.path(""));
    let served = Served::spawn(command);
    served.says("deaf");
    served
}

/// Not a test: a server of another make that does not heed SIGTERM. It counts them in its segment's second page.
#[test]
#[ignore = "run as a process of its own by the test below"]
fn deaf_server() {
    let asked = std::sync::Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, asked.clone()).unwrap();
    let _open = lock_and_listen();
    eprintln!("deaf");
    until("it is asked to stop", || asked.load(Ordering::Relaxed));
    eprintln!("asked");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

/// As a server has them: its file, locked, and its socket, with nobody behind it.
pub fn lock_and_listen() -> (std::fs::File, OwnedFd) {
    let house = std::path::PathBuf::from(std::env::var_os("KVMP_TEST_HOUSE").unwrap());
    let file = std::fs::File::create_new(house.join("lifecycle.kvmp")).unwrap();
    file.write_all_at(b"nothing that kvmp knows", 0).unwrap();
    assert!(try_lock(&file, LockKind::Exclusive, 0, 1).unwrap());
    let address = rustix::net::SocketAddrUnix::new(house.join("kvmp.sock")).unwrap();
    let kind = rustix::net::SocketType::SEQPACKET;
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, kind, None).unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    // Nobody accepts those who look whether somebody listens.
    rustix::net::listen(&socket, 1024).unwrap();
    (file, socket)
}

#[test]
fn a_server_that_does_not_go_in_time_keeps_all_it_has() {
    let house = House::new();
    let mut deaf = other_make(&house, "upgrade::deaf_server");
    let inode = house.inode();
    let (code, log) = house.fails(&["--upgrade", "--drain-timeout", "300ms"]);
    assert!(code == 1 && log.contains(&format!("pid {}, the server at", deaf.pid())), "{log}");
    for words in ["was asked to stop (SIGTERM)", "300ms", "nothing was taken", "--drain-timeout"] {
        assert!(log.contains(words), "{words}: {log}");
    }
    deaf.says("asked");
    assert!(deaf.is_running() && house.socket().exists() && house.inode() == inode);
    assert_eq!(std::fs::read(house.segment()).unwrap(), b"nothing that kvmp knows");
}

#[test]
fn whoever_has_another_segment_is_never_asked_to_stop() {
    let house = House::new();
    let (mut old, engine) = filled(&house, &[]);
    let other_socket = house.path("other.sock");
    let other_socket = other_socket.to_str().unwrap();
    let mut other = house.start(&["--name", "other", "--socket", other_socket]);
    let (code, log) = house.fails(&["--upgrade", "--socket", other_socket]);
    assert!(code == 1 && log.contains(&format!("pid {}, which answers at", other.pid())), "{log}");
    assert!(log.contains("is not the server that has") && log.contains("--upgrade-from"), "{log}");
    assert!(log.contains(&format!("(pid {}, says its header)", old.pid())), "{log}");
    let (code, log) = house.fails(&["--upgrade-from", house.path("none.sock").to_str().unwrap()]);
    assert!(code == 1 && log.contains("no server answers at") && log.contains("none.sock"), "{log}");
    // What would be refused without the old server is refused while it runs.
    std::fs::write(house.path("notes"), "").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (from, notes) = (house.socket(), house.path("notes"));
    let (from, notes) = (from.to_str().unwrap(), notes.to_str().unwrap());
    for (more, why) in [
        (["--socket", notes], "is no socket"),
        (["--socket", other_socket], "another server answers there"),
        (["--tcp", &port.local_addr().unwrap().to_string()], "in use"),
    ] {
        let (code, log) = house.fails(&[&["--upgrade-from", from], &more[..]].concat());
        assert!(code == 1 && log.contains(why), "{why}: {log}");
    }
    assert!(old.is_running() && other.is_running());
    assert_eq!(engine.hit(&chain(1, 50)).unwrap(), 50);
    assert!(![old.log(), other.log()].iter().any(|log| log.contains("SIGTERM")));
}

#[test]
fn the_new_server_may_have_another_socket_and_the_same_port() {
    let house = House::new();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (mut old, engine) = filled(&house, &["--tcp", &tcp]);
    let (from, to) = (house.socket(), house.path("new.sock"));
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let new = house.start(&["--upgrade-from", from, "--socket", to, "--tcp", &tcp]);
    assert_eq!(old.wait().code(), Some(0));
    assert!(new.log().contains("50 blocks kept") && !house.socket().exists(), "{}", new.log());
    let again = engine.again(&format!("tcp://{tcp}"));
    assert_eq!(again.hit(&chain(1, 50)).unwrap(), 50);
}
