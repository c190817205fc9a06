//! `kvmp serve` processes, with all that is theirs in a folder of a test's own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::until;

/// Every server's name in these tests: what is its own is its folder.
pub const NAME: &str = "lifecycle";

/// A folder in memory for segments and sockets; all of it goes with the test.
pub struct House(tempfile::TempDir);

impl House {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("lifecycle-").tempdir_in("/dev/shm").unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn segment(&self) -> PathBuf {
        self.path(&format!("{NAME}.kvmp"))
    }

    pub fn inode(&self) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(self.segment()).unwrap())
    }

    pub fn socket(&self) -> PathBuf {
        self.path("kvmp.sock")
    }

    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// A server's command line; whatever `more` says again goes over it.
    pub fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmp"));
        command.args(["serve", "--arena-dir"]).arg(self.0.path());
        for (flag, value) in [("--name", NAME), ("--size", "16MiB"), ("--chunk", "2MiB"), ("--tcp", "off")] {
            if !more.contains(&flag) {
                command.args([flag, value]);
            }
        }
        if !more.contains(&"--socket") {
            command.arg("--socket").arg(self.socket());
        }
        command.args(more);
        command
    }

    pub fn spawn(&self, more: &[&str]) -> Served {
        Served::spawn(self.command(more))
    }

    /// A server that answers.
    pub fn start(&self, more: &[&str]) -> Served {
        let served = self.spawn(more);
        served.says("ready:");
        served
    }

    /// The exit status and the log of a start that is to fail.
    pub fn fails(&self, more: &[&str]) -> (i32, String) {
        let mut served = self.spawn(more);
        let code = served.wait().code();
        (code.unwrap(), served.log())
    }

    /// The segment, to look at or to damage.
    pub fn file(&self) -> File {
        File::options().read(true).write(true).open(self.segment()).unwrap()
    }
}

/// One process, and its log as far as it has come.
pub struct Served {
    pub child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Served {
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| *into.lock().unwrap() += &(line + "\n"));
        });
        Self { child, log, reader: Some(reader) }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for words in the log; the end of the process ends the wait too.
    pub fn says(&self, words: &str) {
        until(&format!("a server says '{words}'"), || {
            let over = self.reader.as_ref().is_none_or(std::thread::JoinHandle::is_finished);
            let log = self.log();
            assert!(!over || log.contains(words), "it ended without '{words}': {log}");
            log.contains(words)
        });
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// SIGSTOP, and proof that it has stopped.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        until("it has stopped", || self.state() == 'T');
    }

    /// The letter that the kernel has for its state.
    pub fn state(&self) -> char {
        letter(&format!("/proc/{}/stat", self.pid()))
    }

    /// As `state`, of one of its threads.
    pub fn thread_state(&self, name: &str) -> char {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut tasks = tasks.map(|task| task.unwrap().path().display().to_string());
        let task = tasks.find(|task| std::fs::read_to_string(format!("{task}/comm")).unwrap().trim() == name);
        letter(&format!("{}/stat", task.unwrap()))
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, and for the last of its log.
    pub fn wait(&mut self) -> ExitStatus {
        until("the server ends", || !self.is_running());
        self.reader.take().into_iter().for_each(|reader| reader.join().unwrap());
        self.child.wait().unwrap()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.wait();
    }

    /// SIGTERM; the whole log.
    pub fn stop(&mut self) -> String {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.log());
        self.log()
    }
}

fn letter(stat: &str) -> char {
    let stat = std::fs::read_to_string(stat).unwrap();
    stat.rsplit_once(')').unwrap().1.trim_start().chars().next().unwrap()
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
