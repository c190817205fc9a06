//! A standard error that is full and that nobody reads: whatever a process has to say last, it ends.

use std::io::{PipeReader, PipeWriter, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::io::Errno;

use crate::file::doorbell;
use crate::served::House;
use crate::support::until;

/// A process whose standard error is full, and the end of it that is to be read.
struct Unread {
    child: Child,
    log: PipeReader,
}

/// Writes a pipe full; how many bytes that took.
fn fill(pipe: &PipeWriter) -> usize {
    rustix::io::ioctl_fionbio(pipe, true).unwrap();
    let mut bytes = 0;
    loop {
        match rustix::io::write(pipe, &[b'x'; 4096]) {
            Ok(more) => bytes += more,
            Err(Errno::AGAIN) => break,
            Err(error) => panic!("{error}"),
        }
    }
    // The flag is the pipe's, not this descriptor's alone: for the process, a write waits.
    rustix::io::ioctl_fionbio(pipe, false).unwrap();
    bytes
}

impl Unread {
    fn spawn(mut command: Command) -> Self {
        let (log, pipe) = std::io::pipe().unwrap();
        assert!(fill(&pipe) >= 4096);
        let child = command.stderr(pipe).stdout(Stdio::null()).spawn().unwrap();
        Self { child, log }
    }

    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("a process whose standard error is full ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// What is in the pipe: it was full for as long as the process lived, and nothing of it was read.
    fn said(&mut self) -> String {
        let mut said = String::new();
        self.log.read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_error_ends_a_command_all_the_same() {
    let house = House::new();
    let missing = house.path("missing");
    let missing = missing.to_str().unwrap();
    // An error of its own, and one of the command line.
    for args in [&["rm", "nothing", "--arena-dir", missing][..], &["rm", "--such-a-flag"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmp"));
        command.args(args);
        let mut unread = Unread::spawn(command);
        assert_eq!(unread.wait().code(), Some(2), "{args:?}");
        assert!(unread.said().bytes().all(|byte| byte == b'x'), "{args:?}");
    }
}

#[test]
fn a_server_ends_whose_file_is_made_shorter() {
    let house = House::new();
    let mut unread = Unread::spawn(house.command(&[]));
    until("it listens", || house.socket().exists());
    let (_socket, doorbell) = doorbell(&house);
    house.file().set_len(0).unwrap();
    rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
    // By the signal, as a rule; in order, where the watch had looked in that very moment.
    let status = unread.wait();
    assert!(status.signal() == Some(libc::SIGBUS) || status.code() == Some(1), "{status}");
    assert!(unread.said().bytes().all(|byte| byte == b'x'));
}
