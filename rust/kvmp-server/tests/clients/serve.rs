//! A `kvmp serve` of its own: started, killed, started again; its log, descriptors, threads and memory.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::until;

pub struct Serve {
    child: Child,
    dir: tempfile::TempDir,
    name: String,
    size: &'static str,
    log: Arc<Mutex<String>>,
}

impl Serve {
    /// A server that is ready. `name` must be of one test alone.
    pub fn start(name: &str, size: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::default();
        let name = format!("clients-{name}-{}", std::process::id());
        let child = launch(&name, dir.path().join("kvmp.sock"), size, &log);
        Self { child, dir, name, size, log }
    }

    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("kvmp.sock")
    }

    /// SIGKILL and a new start on the same segment.
    pub fn restart(&mut self) {
        self.kill();
        self.log.lock().unwrap().clear();
        self.child = launch(&self.name, self.socket(), self.size, &self.log);
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Lines of this life's log that have `text`.
    pub fn logged(&self, text: &str) -> usize {
        self.log.lock().unwrap().lines().filter(|line| line.contains(text)).count()
    }

    pub fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// A field of `/proc/PID/status` that is a number: `Threads`, `VmRSS` (KiB), `RssAnon` (KiB).
    pub fn status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(format!("/dev/shm/{}.kvmp", self.name));
    }
}

fn launch(name: &str, socket: PathBuf, size: &str, log: &Arc<Mutex<String>>) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvmp"))
        .args(["serve", "--size", size, "--chunk", "2MiB", "--tcp", "off", "--name", name, "--socket"])
        .arg(socket)
        .args(["--until-pid", &std::process::id().to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
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
