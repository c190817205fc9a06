//! The segment file is removed, replaced or made shorter while its server runs.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;

use kvmp_core::wire::{ClientMessage, Hello, Role, ServerMessage, receive, send};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use crate::load::filled;
use crate::served::{House, Served};
use crate::support::{chain, until};

const MIB: u64 = 1 << 20;

fn stop_saying_nothing_is_left(served: &mut Served, words: &str) {
    let log = served.stop();
    assert_eq!(log.matches(words).count(), 1, "{log}");
    assert!(log.contains("nothing is left for the next start") && !log.contains("kvmp rm"), "{log}");
}

#[test]
fn a_server_whose_file_is_removed_or_replaced_serves_on_and_says_once_what_is_lost() {
    type Deed = fn(&House);
    let deeds: [(Deed, &str); 2] = [
        (|house| fs::remove_file(house.segment()).unwrap(), "was removed from outside"),
        (
            |house| {
                fs::write(house.path("notes"), "mine").unwrap();
                fs::rename(house.path("notes"), house.segment()).unwrap();
            },
            "was replaced by another file from outside",
        ),
    ];
    for (deed, words) in deeds {
        let house = House::new();
        let (mut served, engine) = filled(&house, &[]);
        deed(&house);
        served.says(words);
        // Who is there and who comes now: in the same inode as before.
        let again = engine.again(&house.endpoint());
        assert_eq!(again.store(&chain(2, 50)).unwrap(), 50);
        assert_eq!(engine.hit(&chain(2, 50)).unwrap() + again.hit(&chain(1, 50)).unwrap(), 100);
        assert_eq!(again.scheduler.segment_id(), engine.scheduler.segment_id());
        stop_saying_nothing_is_left(&mut served, words);
        assert_eq!(
            fs::read(house.segment()).unwrap_or(b"mine".into()),
            b"mine",
            "what is there now is not the server's"
        );
    }
}

/// Everything of the process is asleep; no client has mapped the file, which would kill this test.
fn idle(house: &House) -> Served {
    let served = house.start(&[]);
    served.says("are backed");
    // All that was to be told to the data plane has been told: asleep now, it has nothing left to do.
    until("the data plane sleeps", || served.thread_state("kvmp-plane") == 'S');
    served
}

#[test]
fn a_server_whose_file_is_made_shorter_ends_and_says_why() {
    // The last chunks; all of it, the header that its threads look at included.
    for left in [80 * MIB, 0] {
        let house = House::new();
        let mut served = idle(&house);
        let inode = house.inode();
        house.file().set_len(left).unwrap();
        assert_eq!(served.wait().code(), Some(1), "{}", served.log());
        let log = served.log();
        assert_eq!(log.matches("it was made shorter from outside").count(), 1, "{log}");
        assert!(log.contains("start it again, on a new segment") && !house.socket().exists(), "{log}");
        assert_eq!(house.file().metadata().unwrap().len(), left, "it must not be made longer again");
        let next = house.start(&[]);
        assert!(next.log().contains("is replaced by a new, empty one") && house.inode() != inode, "{}", next.log());
    }
}

/// A session's socket and the doorbell of the data plane. Nothing is mapped.
pub fn doorbell(house: &House) -> (OwnedFd, OwnedFd) {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(house.socket()).unwrap()).unwrap();
    let (role, pid) = (Role::Tool, std::process::id());
    let hello = Hello { role, pid, engine_token: None, part: None, dma: false, features: vec![] };
    send(&socket, &ClientMessage::Hello(hello), &[]).unwrap();
    let (_, mut fds) = receive::<ServerMessage>(&socket).unwrap();
    (socket, fds.remove(2))
}

#[test]
fn a_server_that_is_killed_by_it_says_what_killed_it() {
    let house = House::new();
    let mut served = idle(&house);
    let (_socket, doorbell) = doorbell(&house);
    let file = house.file();
    file.set_len(0).unwrap();
    rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
    let (status, log) = (served.wait(), served.log());
    // Woken now, the data plane looks into the header; had the watch looked in that very moment, it had ended in order.
    let words = match status.signal() {
        Some(libc::SIGBUS) => "killed by SIGBUS: was the segment made shorter",
        signal => {
            assert_eq!((signal, status.code()), (None, Some(1)), "{log}");
            "it was made shorter from outside"
        }
    };
    assert!(log.contains(words), "{status}: {log}");
    assert!(house.start(&[]).log().contains("is replaced by a new, empty one"));
}
