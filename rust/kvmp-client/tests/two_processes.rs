//! The ring between two processes: what one publishes the other takes, whole and in order, asleep or awake.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Child, Command};
use std::time::Duration;

use kvmp_core::ring::{COMPLETIONS, Consumer, MappedQueue, Parking, Producer, Ring, SUBMISSIONS};
use kvmp_core::segment::{Access, Mapping};
use kvmp_core::sync::Ordering;
use rustix::fs::MemfdFlags;
use rustix::thread::futex;

const ROUNDS: u64 = 20_000;
const WINDOW: u64 = 64;
const RING: &str = "KVMP_TEST_RING";

fn map(file: &File) -> Ring {
    Ring::new(Mapping::new(file, 0, Ring::BYTES, Access::ReadWrite).unwrap())
}

/// Runs `child_echoes` of this very test binary in a process of its own.
fn spawn_child(ring: &File) -> Child {
    let path = format!("/proc/{}/fd/{}", std::process::id(), ring.as_raw_fd());
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_echoes", "--ignored", "--nocapture"])
        .env(RING, path)
        .spawn()
        .unwrap()
}

fn entry(round: u64) -> [u64; 8] {
    std::array::from_fn(|i| round.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(i as u32 * 7))
}

/// Where in the scratch area a round's bytes lie.
fn place(round: u64) -> u32 {
    (round % WINDOW * 64) as u32
}

/// The next completion; sleeps as a client does, so that a lost wake-up shows as a hang.
fn next_completion(ring: &Ring, completions: &mut Consumer<MappedQueue>, child: &mut Child) -> [u64; 8] {
    loop {
        if let Some(entry) = completions.pop().unwrap() {
            return entry;
        }
        let parking = Parking(ring.client_parked());
        parking.announce();
        let seen = ring.completion_futex().load(Ordering::Acquire);
        if !completions.is_ready().unwrap() {
            let limit = rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 };
            let slept = futex::wait(ring.completion_futex(), futex::Flags::empty(), seen, Some(&limit));
            assert_ne!(slept, Err(rustix::io::Errno::TIMEDOUT), "a wake-up was lost");
        }
        parking.withdraw();
        assert!(child.try_wait().unwrap().is_none_or(|status| status.success()), "the child failed");
    }
}

#[test]
fn entries_and_scratch_pass_between_processes() {
    let memory = File::from(rustix::fs::memfd_create("two-processes", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(Ring::BYTES).unwrap();
    let ring = map(&memory);
    let mut child = spawn_child(&memory);
    let mut submissions = Producer::new(ring.queue(SUBMISSIONS));
    let mut completions = Consumer::new(ring.queue(COMPLETIONS));
    let mut sent = 0;
    for round in 0..ROUNDS {
        while sent < ROUNDS && sent < round + WINDOW {
            ring.write_scratch(place(sent), &sent.to_le_bytes().repeat(8));
            submissions.push(&entry(sent)).unwrap().unwrap();
            sent += 1;
        }
        assert_eq!(next_completion(&ring, &mut completions, &mut child), entry(round).map(|word| !word));
        let mut bytes = [0; 64];
        ring.read_scratch(place(round), &mut bytes);
        assert_eq!(bytes.as_slice(), (!round).to_le_bytes().repeat(8));
    }
    assert!(child.wait().unwrap().success());
}

/// The other process: checks every entry and its scratch bytes, and sends both back inverted.
#[test]
#[ignore = "started by the test above, in a process of its own"]
fn child_echoes() {
    let Ok(path) = std::env::var(RING) else { return };
    let ring = map(&File::options().read(true).write(true).open(path).unwrap());
    let mut submissions = Consumer::new(ring.queue(SUBMISSIONS));
    let mut completions = Producer::new(ring.queue(COMPLETIONS));
    let started = std::time::Instant::now();
    for round in 0..ROUNDS {
        let asked = loop {
            match submissions.pop().unwrap() {
                Some(asked) => break asked,
                None => assert!(started.elapsed() < Duration::from_secs(60), "the parent is gone"),
            }
            std::thread::yield_now();
        };
        assert_eq!(asked, entry(round));
        let mut bytes = [0; 64];
        ring.read_scratch(place(round), &mut bytes);
        assert_eq!(bytes.as_slice(), round.to_le_bytes().repeat(8));
        ring.write_scratch(place(round), &bytes.map(|byte| !byte));
        completions.push(&asked.map(|word| !word)).unwrap().unwrap();
        if Parking(ring.client_parked()).must_ring() {
            futex::wake(ring.completion_futex(), futex::Flags::empty(), 1).unwrap();
        }
    }
}
