//! How much memory there is for a segment: the file system, the machine, the tightest cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfs;

/// Something that bounds the segment's memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bound {
    /// What it is, for a person.
    pub what: String,
    /// Bytes it could ever give.
    pub total: u64,
    /// Bytes it has free now.
    pub free: u64,
    /// What makes it larger.
    pub mend: String,
    /// Whether the server's own memory (its index of the blocks) comes out of it too.
    pub is_for_all: bool,
}

/// Where the kernel's files lie; a test lays its own.
#[derive(Clone, Debug)]
pub struct Sources {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// `/sys/devices/system/node`.
    pub nodes: PathBuf,
}

impl Default for Sources {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into(), nodes: "/sys/devices/system/node".into() }
    }
}

/// The bound whose `total` is least: what could never fit is over this.
#[must_use]
pub fn tightest_total(bounds: &[Bound]) -> Option<&Bound> {
    bounds.iter().min_by_key(|bound| bound.total)
}

/// The bound whose `free` is least: what runs out first.
#[must_use]
pub fn tightest_free(bounds: &[Bound]) -> Option<&Bound> {
    bounds.iter().min_by_key(|bound| bound.free)
}

/// Every bound on memory taken in `arena_dir`, on this machine now.
#[must_use]
pub fn memory_bounds(arena_dir: &Path) -> Vec<Bound> {
    bounds(arena_dir, &Sources::default())
}

/// Every bound on memory taken in `arena_dir`.
#[must_use]
pub fn bounds(arena_dir: &Path, sources: &Sources) -> Vec<Bound> {
    let mut all: Vec<Bound> = file_system(arena_dir).into_iter().chain(machine(sources)).collect();
    all.extend(cgroups(sources));
    all
}

fn file_system(dir: &Path) -> Option<Bound> {
    let StatVfs { f_frsize, f_blocks, f_bavail, .. } = rustix::fs::statvfs(dir).ok()?;
    // A tmpfs made with size=0 has no limit of its own and reports no blocks.
    (f_blocks > 0).then(|| Bound {
        what: format!("the file system at {}", dir.display()),
        total: f_blocks * f_frsize,
        free: f_bavail * f_frsize,
        mend: format!("mount -o remount,size=SIZE {}", dir.display()),
        is_for_all: false,
    })
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':')))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

fn machine(sources: &Sources) -> Option<Bound> {
    let text = fs::read_to_string(sources.proc.join("meminfo")).ok()?;
    Some(Bound {
        what: "the machine's memory".into(),
        total: meminfo(&text, "MemTotal")?,
        free: meminfo(&text, "MemAvailable")?,
        mend: "take a machine with more memory".into(),
        is_for_all: true,
    })
}

fn cgroups(sources: &Sources) -> Vec<Bound> {
    let Ok(text) = fs::read_to_string(sources.proc.join("self/cgroup")) else { return Vec::new() };
    text.lines().flat_map(|line| cgroup_line(line, &sources.cgroup)).collect()
}

/// `0::/path` is cgroup v2; `N:memory:/path` (among other controllers) is v1's memory hierarchy.
fn cgroup_line(line: &str, root: &Path) -> Vec<Bound> {
    let mut fields = line.splitn(3, ':');
    let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
        return Vec::new();
    };
    let path = path.trim_start_matches('/');
    if controllers.is_empty() {
        levels(root, path, "memory.max", "memory.current")
    } else if controllers.split(',').any(|c| c == "memory") {
        levels(&root.join("memory"), path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    } else {
        Vec::new()
    }
}

/// A cgroup's own limit and those of all that hold it.
fn levels(root: &Path, path: &str, limit: &str, usage: &str) -> Vec<Bound> {
    let own = root.join(path);
    own.ancestors().take_while(|dir| dir.starts_with(root)).filter_map(|dir| level(dir, limit, usage)).collect()
}

fn level(dir: &Path, limit: &str, usage: &str) -> Option<Bound> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" (v2) does not parse; v1 says "no limit" with a number near 2^63.
    let total = read(limit).filter(|&bytes| bytes < 1 << 60)?;
    Some(Bound {
        what: format!("the memory cgroup {}", dir.display()),
        total,
        free: total.saturating_sub(read(usage).unwrap_or(0).saturating_sub(reclaimable(dir))),
        mend: format!("raise {}", dir.join(limit).display()),
        is_for_all: true,
    })
}

/// Page cache of files, which counts as used but is given up when memory is wanted.
fn reclaimable(dir: &Path) -> u64 {
    let text = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<u64>().ok())
    };
    // v1 counts a hierarchy under the names with `total_`; its plain ones leave the children out.
    let sum = |prefix: &str| {
        Some(value(&format!("{prefix}inactive_file"))? + value(&format!("{prefix}active_file")).unwrap_or(0))
    };
    sum("total_").or_else(|| sum("")).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lay(files: &[(&str, &str)]) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let sources = Sources { proc: dir.path().join("proc"), cgroup: dir.path().join("cg"), ..Sources::default() };
        (dir, sources)
    }

    #[test]
    fn the_tightest_of_a_v2_chain_counts() {
        let (_dir, sources) = lay(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("cg/a/memory.max", "1000\n"),
            ("cg/a/memory.current", "400\n"),
            ("cg/a/memory.stat", "anon 100\ninactive_file 200\nactive_file 50\n"),
            ("cg/a/b/memory.max", "max\n"),
        ]);
        let found = cgroups(&sources);
        assert_eq!(found.iter().map(|b| (b.total, b.free)).collect::<Vec<_>>(), [(1000, 850)]);
        assert!(found[0].mend.ends_with("a/memory.max"));
    }

    #[test]
    fn v1_memory_counts_and_other_controllers_do_not() {
        let (_dir, sources) = lay(&[
            ("proc/self/cgroup", "5:cpu:/x\n4:memory,blkio:/x\n"),
            ("cg/memory/x/memory.limit_in_bytes", "500\n"),
            ("cg/memory/x/memory.usage_in_bytes", "600\n"),
            ("cg/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(cgroups(&sources).iter().map(|b| (b.total, b.free)).collect::<Vec<_>>(), [(500, 0)]);
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let (_dir, sources) = lay(&[("proc/meminfo", "MemTotal:  2 kB\nMemAvailableX: 9 kB\nMemAvailable: 1 kB\n")]);
        let bound = machine(&sources).unwrap();
        assert_eq!((bound.total, bound.free), (2048, 1024));
    }

    #[test]
    fn this_machine_has_bounds() {
        let all = bounds(Path::new("/dev/shm"), &Sources::default());
        assert!(tightest_total(&all).unwrap().total > 0);
        assert!(tightest_free(&all).is_some());
    }
}
