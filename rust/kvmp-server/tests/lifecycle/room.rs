//! Memory that runs out: a small tmpfs in a mount namespace of its own, and a real memory cgroup. Where this machine does
//! not let us have one, its test says so and passes.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvmp_client::{Client, ConnectOptions};
use kvmp_core::wire::Role;

use crate::attached::Attached;
use crate::served::{House, Served};
use crate::support::refused::Need;
use crate::support::served::serve;
use crate::support::{chain, patience, spec, until};

const MIB: u64 = 1 << 20;

/// A process in a mount namespace with a small tmpfs, which is there as long as it runs.
struct SmallTmpfs {
    keeper: Served,
    dir: PathBuf,
}

impl SmallTmpfs {
    /// `None`: this machine does not let us mount.
    fn new(house: &House, size: &str) -> Option<Self> {
        let dir = house.path("small");
        fs::create_dir(&dir).unwrap();
        let script =
            format!("mount -t tmpfs -o size={size} none {} && echo mounted >&2 && exec sleep 1000", dir.display());
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", &script]);
        let mut keeper = Served::spawn(command);
        until("it has mounted or cannot", || keeper.log().contains("mounted") || !keeper.is_running());
        if keeper.is_running() {
            return Some(Self { keeper, dir });
        }
        Need::Mounts.refused(keeper.log());
        None
    }

    /// A server with its segment there. Later flags go over earlier ones.
    fn server(&self, house: &House, more: &[&str]) -> Served {
        let mut command = Command::new("nsenter");
        command.args(["--preserve-credentials", "-U", "-m", "-t", &self.keeper.pid().to_string()]);
        let serve = serve();
        command.arg(serve.get_program()).args(serve.get_args());
        command.args(["--tcp", "off", "--name", "room", "--chunk", "2MiB"]);
        command.arg("--arena-dir").arg(&self.dir).arg("--socket").arg(house.socket()).args(more);
        Served::spawn(command)
    }

    /// The folder as it is seen from outside the namespace.
    fn outside(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.keeper.pid(), self.dir.display()))
    }

    /// Fills it up to its last byte, or with so many.
    fn fill(&self, name: &str, bytes: u64) {
        let mut ballast = File::create(self.outside().join(name)).unwrap();
        let block = vec![1; 4096];
        for _ in 0..bytes / 4096 {
            if ballast.write_all(&block).is_err() {
                return;
            }
        }
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.outside()).unwrap();
        stat.f_bavail * stat.f_frsize
    }
}

/// Stores until blocks have been evicted for others: every slot has been written.
fn use_all_of_it(engine: &Attached) {
    let slot = engine.namespace.spec().parts[0].bytes[0].next_multiple_of(4096);
    let (mut seed, length) = (10, (engine.stat("backed_bytes") / slot / 10).min(16_000) as usize);
    until("all slots have been used", || {
        engine.store(&chain(seed, length)).unwrap();
        assert_eq!(engine.hit(&chain(seed, length)).unwrap(), length);
        seed += 1;
        engine.stat("evictions") > 100
    });
}

fn attach(house: &House, bytes: u64) -> Attached {
    let engine = Attached::new(&house.endpoint(), &spec("m", &[bytes]), None).unwrap();
    until("the growth has ended", || engine.stats()["warming"] == false);
    engine
}

fn count(log: &str, words: &str) -> usize {
    log.matches(words).count()
}

#[test]
fn a_tmpfs_that_fills_up_leaves_the_arena_as_large_as_it_got() {
    let house = House::new();
    let Some(small) = SmallTmpfs::new(&house, "40m") else { return };
    let mut never = small.server(&house, &["--size", "64MiB"]);
    assert_eq!(never.wait().code(), Some(2));
    assert!(never.log().contains("--size 64 MiB could never fit: the file system at"), "{}", never.log());
    small.fill("ballast", 20 * MIB);
    let mut served = small.server(&house, &["--size", "32MiB"]);
    served.says("the arena stays at");
    let engine = attach(&house, 9000);
    let backed = engine.stat("backed_bytes");
    assert!((2 * MIB..32 * MIB).contains(&backed), "{backed}");
    // Now not a page is left, and everything that the server touches must be its own by now.
    small.fill("rest", 40 * MIB);
    assert_eq!(small.free(), 0);
    use_all_of_it(&engine);
    // A start that dies is started again by whoever watches it: that ends with a server, and its blocks.
    engine.store(&chain(1, 50)).unwrap();
    for _ in 0..2 {
        assert_eq!(count(&served.log(), "WARN"), 1, "{}", served.log());
        served.kill();
        // Damage: the bit of a namespace whose entry has no memory. To read it would take a page, and there is none.
        let segment = File::options().read(true).write(true).open(small.outside().join("room.kvmp")).unwrap();
        segment.write_all_at(&[255], 512 + 20).unwrap();
        served = small.server(&house, &["--size", "32MiB"]);
        served.says("the arena stays at");
        let again = engine.again(&house.endpoint());
        assert_eq!((again.hit(&chain(1, 50)).unwrap(), again.stat("backed_bytes")), (50, backed));
    }
    // Namespaces of which the table has no memory are refused by name.
    let tool = Client::connect(&house.endpoint(), &ConnectOptions::new(Role::Scheduler), &patience()).unwrap();
    let refused = (0..20).find_map(|i| tool.open(&spec(&format!("model {i}"), &[9000]), &patience()).err());
    let refused = refused.unwrap().to_string();
    assert!(refused.contains("no memory for the namespace's entry"), "{refused}");
    assert!(served.stop().contains("SIGTERM: stopping"));
}

#[test]
fn without_room_for_one_chunk_there_is_no_server() {
    let house = House::new();
    let Some(small) = SmallTmpfs::new(&house, "8m") else { return };
    // Room for the table, not for a chunk.
    small.fill("ballast", 6 * MIB);
    let mut served = small.server(&house, &["--size", "8MiB"]);
    let (code, log) = (served.wait().code(), served.log());
    assert!(code == Some(1) && log.contains("no room for even one chunk of 2 MiB"), "{log}");
    assert!(log.contains("remount,size=SIZE") && !house.socket().exists(), "{log}");
    let left: Vec<_> = fs::read_dir(small.outside()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["ballast"]);
}

/// A memory cgroup below the one that this process is in.
struct Cgroup {
    dir: PathBuf,
    limit: &'static str,
    kills: (&'static str, &'static str),
}

impl Cgroup {
    /// `None`: this machine does not let us have one.
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let text = fs::read_to_string("/proc/self/cgroup").unwrap();
        let found = text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
            match controllers {
                "memory" => Some((
                    Path::new("/sys/fs/cgroup/memory").join(path),
                    "memory.limit_in_bytes",
                    ("memory.oom_control", "oom_kill "),
                )),
                "" => Some((Path::new("/sys/fs/cgroup").join(path), "memory.max", ("memory.events", "oom_kill "))),
                _ => None,
            }
        });
        let Some((parent, limit, kills)) = found else {
            Need::Cgroup.refused(format!("this process is in none: {text}"));
            return None;
        };
        let dir = parent.join(format!("{name}-{}", std::process::id()));
        let made = fs::create_dir(&dir).and_then(|()| fs::write(dir.join(limit), bytes.to_string()));
        let this = Self { dir, limit, kills };
        if made.is_err() {
            Need::Cgroup.refused(format!("none can be made at {}: {made:?}", this.dir.display()));
        }
        made.is_ok().then_some(this)
    }

    fn server(&self, house: &House, more: &[&str]) -> Served {
        let serve = house.command(more);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", self.dir.display())]);
        command.arg(serve.get_program()).args(serve.get_args());
        Served::spawn(command)
    }

    /// How many processes of it were killed for want of memory.
    fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join(self.kills.0)).unwrap();
        text.lines().find_map(|line| line.strip_prefix(self.kills.1)?.trim().parse().ok()).unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

#[test]
fn a_memory_cgroup_smaller_than_the_arena_kills_nobody() {
    let house = House::new();
    let Some(cgroup) = Cgroup::new("lifecycle-room", 64 * MIB) else { return };
    let mut never = cgroup.server(&house, &["--size", "128MiB"]);
    assert_eq!(never.wait().code(), Some(2));
    let log = never.log();
    assert!(log.contains("--size 128 MiB could never fit: the memory cgroup") && log.contains(cgroup.limit), "{log}");
    let mut served = cgroup.server(&house, &["--size", "64MiB"]);
    served.says("the arena stays at");
    // The smallest slots there are: the index is as large as it can be.
    let engine = attach(&house, 4096);
    let backed = engine.stat("backed_bytes");
    assert!((16 * MIB..64 * MIB).contains(&backed), "{backed}");
    for _ in 0..2 {
        use_all_of_it(&engine.again(&house.endpoint()));
        assert_eq!((count(&served.log(), "WARN"), cgroup.kills()), (1, 0), "{}", served.log());
        served.kill();
        served = cgroup.server(&house, &["--size", "64MiB"]);
        served.says("the arena stays at");
    }
    assert!(engine.again(&house.endpoint()).stat("blocks_ready") > 1000);
    assert!(served.stop().contains("SIGTERM: stopping"));
    assert_eq!(cgroup.kills(), 0);
}
