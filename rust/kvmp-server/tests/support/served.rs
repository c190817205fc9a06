//! Processes of `kvmp serve` that end with the test run, and what they log.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use super::until;

/// `kvmp serve`, which stops when this process ends, be it killed.
pub fn serve() -> Command {
    let mut command = serve_on();
    command.args(["--until-pid", &std::process::id().to_string()]);
    command
}

/// `kvmp serve`, whose test says itself when it ends.
pub fn serve_on() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmp"));
    command.arg("serve");
    goes_on_without_this(&mut command);
    command
}

/// A process that is stopped when this one ends goes on, and so sees that it ended.
pub fn goes_on_without_this(command: &mut Command) {
    // SAFETY: between fork and exec one system call is made, which touches no memory and takes no lock.
    unsafe { command.pre_exec(|| set_parent_process_death_signal(Some(Signal::CONT)).map_err(Into::into)) };
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

    /// One whose log goes elsewhere.
    pub fn unread(mut command: Command, log: File) -> Self {
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child, log: Arc::default(), reader: None }
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
