//! A `kvmp serve` of its own: started, killed, started again; its log, descriptors, threads and memory.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::served::serve;
use crate::support::until;

pub struct Serve {
    child: Child,
    dir: tempfile::TempDir,
    name: String,
    tcp: &'static str,
    log: Arc<Mutex<String>>,
}

impl Serve {
    /// A server that is ready. `name` must be of one test alone.
    pub fn start(name: &str) -> Self {
        Self::ready(name, "off")
    }

    /// One with a rendezvous on a port that is free.
    pub fn with_tcp(name: &str) -> Self {
        Self::ready(name, "127.0.0.1:0")
    }

    fn ready(name: &str, tcp: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::default();
        let name = format!("clients-{name}-{}", std::process::id());
        let child = launch(&name, dir.path().join("kvmp.sock"), tcp, &log);
        Self { child, dir, name, tcp, log }
    }

    /// Host and port of the rendezvous, from the line that says that the server is ready.
    pub fn tcp(&self) -> String {
        let log = self.log.lock().unwrap();
        let (_, rest) = log.split_once("(tcp://").unwrap();
        rest.split_once(' ').unwrap().0.to_owned()
    }

    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("kvmp.sock")
    }

    fn segment(&self) -> PathBuf {
        format!("/dev/shm/{}.kvmp", self.name).into()
    }

    /// A server whose log nobody reads: the reading end of the pipe, to be read later.
    pub fn mute(name: &str) -> (Self, ChildStderr) {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("clients-{name}-{}", std::process::id());
        let mut child = command(&name, dir.path().join("kvmp.sock"), "off").spawn().unwrap();
        let unread = child.stderr.take().unwrap();
        let this = Self { child, dir, name, tcp: "off", log: Arc::default() };
        until("it listens", || this.socket().exists());
        (this, unread)
    }

    /// SIGKILL and a new start on the same segment.
    pub fn restart(&mut self) {
        self.kill();
        self.log.lock().unwrap().clear();
        self.child = launch(&self.name, self.socket(), self.tcp, &self.log);
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops it, and waits until the kernel says that every thread of it is stopped.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        until("the server is stopped", || is_stopped(self.pid()));
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Lines of this life's log that have `text`.
    pub fn logged(&self, text: &str) -> usize {
        self.log.lock().unwrap().lines().filter(|line| line.contains(text)).count()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_thread(&self, name: &str) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.into_iter().any(|found| found.trim() == name)
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(self.segment());
    }
}

#[test]
fn a_server_of_these_tests_leaves_no_file() {
    let server = Serve::start("leaves");
    let (segment, socket) = (server.segment(), server.socket());
    assert!(segment.exists() && socket.exists());
    drop(server);
    assert!(!segment.exists() && !socket.exists());
}

/// Whether every thread of a process is stopped.
pub fn is_stopped(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).unwrap();
    tasks.map(|task| stat(task.unwrap())).all(|text| text.rsplit_once(')').unwrap().1.trim_start().starts_with('T'))
}

fn command(name: &str, socket: PathBuf, tcp: &str) -> Command {
    let mut command = serve();
    command
        .args(["--size", "4MiB", "--chunk", "2MiB", "--tcp", tcp, "--name", name, "--socket"])
        .arg(socket)
        // A test that is killed leaves neither server nor file.
        .arg("--ephemeral")
        .stderr(Stdio::piped());
    command
}

fn launch(name: &str, socket: PathBuf, tcp: &str, log: &Arc<Mutex<String>>) -> Child {
    let mut child = command(name, socket, tcp).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let into = Arc::clone(log);
    // Read to the end, so that the server never blocks on its own log.
    std::thread::spawn(move || {
        lines.map_while(Result::ok).for_each(|line| {
            let mut log = into.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        });
    });
    until("the server is ready", || log.lock().unwrap().contains("ready:"));
    child
}
