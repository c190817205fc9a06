//! Lives and kills, one after the other on one segment.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, waitpid};
use tempfile::TempDir;

use super::blocks::Random;
use super::life::SEGMENT;
use super::page::{Call, Page, Stage, Work};
use super::table::Order;
use super::witness::{Left, Verdict, Witness};

/// Only a hang passes it.
const WATCHDOG: Duration = Duration::from_secs(20);

/// See the module.
pub struct Kills {
    dir: TempDir,
    pub(super) page: Page,
    order: Order,
    pub(super) random: Random,
    witness: Witness,
    pub tally: Tally,
}

/// Where kills fell, and what they left.
#[derive(Default)]
pub struct Tally {
    pub kills: u64,
    pub in_call: BTreeMap<Call, u64>,
    pub in_work: BTreeMap<Work, u64>,
    pub blocks_checked: u64,
    pub quarantined: u64,
    pub torn: u64,
    pub sealed: u64,
}

impl Tally {
    fn add(&mut self, (work, call): (Work, Call), left: &Left) {
        self.kills += 1;
        *self.in_call.entry(call).or_default() += 1;
        *self.in_work.entry(work).or_default() += 1;
        self.blocks_checked += left.kept;
        self.quarantined += left.quarantined;
        self.torn += left.torn;
        self.sealed += left.sealed;
    }

    pub fn inside(&self, call: Call) -> u64 {
        self.in_call.get(&call).copied().unwrap_or(0)
    }
}

impl Kills {
    pub fn new(order: Order, seed: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("crash-anywhere-").tempdir_in("/dev/shm").unwrap();
        let page = Page::open(dir.path());
        Self { dir, page, order, random: Random(seed), witness: Witness::default(), tally: Tally::default() }
    }

    /// One life, its end at a random instant, and what that left.
    pub fn one(&mut self) -> Verdict {
        self.page.reset();
        let mut life = self.start();
        // Some die while they recover, most at work.
        let (stage, us) = if self.random.below(10) == 0 { (Stage::Recovering, 600) } else { (Stage::Working, 2500) };
        life.wait_until(|| self.page.has_come_to(stage));
        std::thread::sleep(Duration::from_micros(self.random.below(us)));
        self.end(life)
    }

    /// One life of a slow order, killed in a call of a kind after so many of its stores.
    pub fn held(&mut self, call: Call, stores: u64) -> Verdict {
        self.page.reset();
        let after = 1 + self.random.below(150);
        self.page.ask_to_hold(call, after, stores);
        let mut life = self.start();
        life.wait_until(|| self.page.is_held());
        self.end(life)
    }

    /// Kills a life and looks at what that leaves.
    pub(super) fn end(&mut self, mut life: Life) -> Verdict {
        life.kill();
        let verdict = self.witness.examine(self.dir.path());
        self.tally.add(self.page.last(), &verdict.left);
        verdict
    }

    /// Calls of a kind that all lives finished.
    pub fn finished(&self, call: Call) -> u64 {
        self.page.finished(call)
    }

    /// This very binary, which runs the one test that is a life.
    pub(super) fn start(&mut self) -> Life {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill_anywhere::a_life", "--ignored", "--nocapture", "--test-threads=1"])
            .env("KVMP_LIFE_DIR", self.dir.path())
            .env("KVMP_LIFE_ORDER", format!("{:?}", self.order))
            .env("KVMP_LIFE_SEED", self.random.next().to_string())
            .stdout(Stdio::null())
            .spawn();
        Life { child: child.unwrap(), traced: None }
    }

    /// The segment's path.
    pub(super) fn segment(&self) -> PathBuf {
        self.dir.path().join(format!("{SEGMENT}.kvmp"))
    }
}

/// A life under way; dead when dropped, whatever a test's assertion says.
pub(super) struct Life {
    child: Child,
    /// The thread of it that this one traces.
    pub traced: Option<Pid>,
}

impl Life {
    /// Waits for what the life notes in the page.
    pub fn wait_until(&mut self, noted: impl Fn() -> bool) {
        let end = Instant::now() + WATCHDOG;
        while !noted() {
            assert!(
                self.child.try_wait().unwrap().is_none(),
                "a life ended before its work began; its words are above"
            );
            assert!(Instant::now() < end, "a life never came to its work");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.let_go();
        let status = self.child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "a life ended by itself: {status}; its words are above");
    }

    /// A traced thread that died is there until its tracer has seen so, and its process as long.
    fn let_go(&mut self) {
        let main = self.child.id() as i32;
        if let Some(thread) = self.traced.take().filter(|thread| thread.as_raw_nonzero().get() != main) {
            while !matches!(wait_for_thread(thread), Err(_) | Ok(None)) {}
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.let_go();
        let _ = self.child.wait();
    }
}

/// The signal that a traced thread stopped with, once it has; `None` when it has ended.
pub(super) fn wait_for_thread(thread: Pid) -> rustix::io::Result<Option<i32>> {
    // Threads that are no process's first are waited for with this only.
    let all = WaitOptions::from_bits_retain(libc::__WALL as u32);
    let status = rustix::io::retry_on_intr(|| waitpid(Some(thread), all))?;
    Ok(status.and_then(|(_, status)| status.stopping_signal()))
}
