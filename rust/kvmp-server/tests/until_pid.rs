//! `kvmp serve --until-pid`: the real binary ends with the process it watches, as it would after SIGTERM.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(dead_code, reason = "each test binary uses its share of `support`")]

mod support;

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use support::until;

/// A process that runs until it is killed.
fn engine() -> Child {
    Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()
}

/// A `kvmp serve --until-pid` with everything of it in a folder of its own, but the segment.
struct Served {
    dir: tempfile::TempDir,
    child: Child,
    segment: PathBuf,
}

impl Served {
    fn new(name: &str, pid: u32, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let segment = PathBuf::from(format!("/dev/shm/{name}.kvmp"));
        let child = Command::new(env!("CARGO_BIN_EXE_kvmp"))
            .args(["serve", "--size", "4MiB", "--tcp", "off", "--name", name, "--until-pid", &pid.to_string()])
            .args(more)
            .arg("--socket")
            .arg(dir.path().join("kvmp.sock"))
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Self { dir, child, segment }
    }

    fn log(&self) -> String {
        let mut text = String::new();
        std::fs::File::open(self.dir.path().join("log")).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("the server ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.segment);
    }
}

fn serve_until_killed(name: &str, more: &[&str]) -> Served {
    let mut watched = engine();
    let mut served = Served::new(name, watched.id(), more);
    until("the server is ready", || served.log().contains("ready:"));
    assert!(served.child.try_wait().unwrap().is_none());
    watched.kill().unwrap();
    assert_eq!(served.wait().code(), Some(0), "{}", served.log());
    assert!(served.log().contains(&format!("process {} ended: stopping", watched.id())), "{}", served.log());
    watched.wait().unwrap();
    served
}

#[test]
fn the_server_ends_with_the_process_and_leaves_its_segment() {
    let served = serve_until_killed("test-until", &[]);
    assert!(served.segment.exists());
    assert!(!served.dir.path().join("kvmp.sock").exists());
    assert!(served.log().contains("kvmp rm test-until"), "{}", served.log());
}

#[test]
fn an_ephemeral_server_leaves_nothing() {
    let served = serve_until_killed("test-until-ephemeral", &["--ephemeral"]);
    assert!(!served.segment.exists());
}

#[test]
fn a_process_that_is_not_there_is_refused() {
    let mut gone = engine();
    gone.kill().unwrap();
    gone.wait().unwrap();
    let mut served = Served::new("test-until-nobody", gone.id(), &[]);
    assert_eq!(served.wait().code(), Some(2));
    assert!(served.log().contains(&format!("--until-pid {}: there is no such process", gone.id())), "{}", served.log());
    assert!(!served.segment.exists());
}

#[test]
fn the_file_names_the_process_too_and_the_flag_goes_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kvmp.toml");
    std::fs::write(&file, "until-pid = 0\n").unwrap();
    let mut alone = Command::new(env!("CARGO_BIN_EXE_kvmp"));
    let output = alone.args(["serve", "--size", "4MiB", "--config"]).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--until-pid 0: is no process id"));
    serve_until_killed("test-until-file", &["--ephemeral", "--config", file.to_str().unwrap()]);
}
