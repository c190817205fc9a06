//! Where `kvmp serve` processes have all that is theirs: a folder of a test's own.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use super::served::{Served, serve, serve_on};

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
        self.filled_in(if more.contains(&"--until-pid") { serve_on() } else { serve() }, more)
    }

    /// As `command`, for a pid namespace where this process has no pid: something else must end it.
    pub fn command_on(&self, more: &[&str]) -> Command {
        self.filled_in(serve_on(), more)
    }

    fn filled_in(&self, mut command: Command, more: &[&str]) -> Command {
        command.arg("--arena-dir").arg(self.0.path());
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
