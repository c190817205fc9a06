//! NUMA: the arena's memory is spread page by page over the nodes of the machine, as engines on every socket copy from it,
//! unless whoever started the server has said where its memory is to lie (`numactl`, a service's `NUMAPolicy=`).

use std::io;
use std::ptr;

use crate::limits::Sources;

/// A node mask of the kernel's greatest number of nodes, 1,024.
type Mask = [u64; 16];

/// Where the memory lies that this thread takes from now on.
#[derive(Debug)]
pub enum Placement {
    /// There is but one node.
    OneNode,
    /// By turns on each of these nodes.
    Spread(Vec<u32>),
    /// By the policy that the process was started with.
    AsStarted,
    /// Near whatever processor the thread runs on: the kernel let no policy be set.
    Refused(io::Error),
}

/// Spreads what the calling thread takes from now on; threads that it starts later do the same.
#[must_use]
pub fn spread(sources: &Sources) -> Placement {
    let nodes = nodes(sources);
    if nodes.len() < 2 {
        return Placement::OneNode;
    }
    match policy() {
        Ok(libc::MPOL_DEFAULT) => match interleave(&nodes) {
            Ok(()) => Placement::Spread(nodes),
            Err(e) => Placement::Refused(e),
        },
        Ok(_) => Placement::AsStarted,
        Err(e) => Placement::Refused(e),
    }
}

/// Says it in the log, where there is a choice.
pub fn report(placement: &Placement) {
    match placement {
        Placement::OneNode => {}
        Placement::Spread(nodes) => tracing::info!("the arena is spread over the NUMA nodes {nodes:?}"),
        Placement::AsStarted => {
            tracing::info!("the arena lies on the NUMA nodes that the policy names which the server was started with");
        }
        Placement::Refused(e) => tracing::warn!(
            "the arena is not spread over the NUMA nodes, so copies from far GPUs are slower: the kernel lets no memory \
             policy be set ({e}); in a container, add the capability SYS_NICE, or start the server under `numactl \
             --interleave=all`"
        ),
    }
}

/// Nodes that the process may use and that have memory and processors: without the latter the memory is a GPU's, or a slow one.
fn nodes(sources: &Sources) -> Vec<u32> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let [with_memory, with_cpu] = ["has_memory", "has_cpu"].map(|name| parse(&read(sources.nodes.join(name))));
    let status = read(sources.proc.join("self/status"));
    let allowed = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    let allowed = parse(allowed.unwrap_or_default());
    with_memory.into_iter().filter(|node| with_cpu.contains(node) && allowed.contains(node)).collect()
}

/// A list as the kernel writes it, `0-1,4`; what is none is empty.
fn parse(list: &str) -> Vec<u32> {
    let range = |range: &str| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to) = (from.parse().ok()?, to.parse().ok()?);
        (to < u64::BITS * Mask::default().len() as u32).then_some(from..=to)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// The calling thread's mode, without its flags.
fn policy() -> io::Result<i32> {
    let mut mode = 0;
    let mode_at: *mut i32 = &raw mut mode;
    // SAFETY: the kernel writes one int where a local lies; a null mask of no bits is one that it does not write.
    let done = unsafe { libc::syscall(libc::SYS_get_mempolicy, mode_at, ptr::null::<u64>(), 0usize, 0usize, 0usize) };
    let flags = libc::MPOL_F_STATIC_NODES | libc::MPOL_F_RELATIVE_NODES | libc::MPOL_F_NUMA_BALANCING;
    if done == 0 { Ok(mode & !flags) } else { Err(io::Error::last_os_error()) }
}

fn interleave(nodes: &[u32]) -> io::Result<()> {
    let mut mask = Mask::default();
    for node in nodes {
        mask[(node / u64::BITS) as usize] |= 1 << (node % u64::BITS);
    }
    // The kernel takes one bit less than it is told of.
    let bits = mask.len() * u64::BITS as usize + 1;
    // SAFETY: the kernel reads the mask, which has that many bits, during the call.
    let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_INTERLEAVE, mask.as_ptr(), bits) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lay(with_memory: &str, with_cpu: &str, allowed: &str) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources { proc: dir.path().into(), nodes: dir.path().join("node"), ..Sources::default() };
        std::fs::create_dir_all(dir.path().join("self")).unwrap();
        std::fs::create_dir_all(&sources.nodes).unwrap();
        std::fs::write(sources.nodes.join("has_memory"), with_memory).unwrap();
        std::fs::write(sources.nodes.join("has_cpu"), with_cpu).unwrap();
        std::fs::write(dir.path().join("self/status"), format!("Name:\tx\nMems_allowed_list:\t{allowed}\n")).unwrap();
        (dir, sources)
    }

    /// What the kernel says of the calling thread's policy.
    fn asked() -> (i32, Mask) {
        let (mut mode, mut mask) = (0, Mask::default());
        let (mode_at, mask_at): (*mut i32, *mut u64) = (&raw mut mode, mask.as_mut_ptr());
        // SAFETY: both are locals, and the mask has the bits that are named.
        let done = unsafe { libc::syscall(libc::SYS_get_mempolicy, mode_at, mask_at, 1024usize, 0usize, 0usize) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        (mode, mask)
    }

    #[test]
    fn nodes_without_memory_or_processors_or_leave_are_none() {
        for (with_memory, with_cpu, allowed, expected) in [
            ("0-1\n", "0-1\n", "0-1", &[0, 1][..]),
            // Of a Grace Hopper: 2 to 9 are the GPU's memory.
            ("0-1,2-9\n", "0-1\n", "0-9", &[0, 1]),
            ("0-3\n", "0-3\n", "1,3", &[1, 3]),
            ("0,2-3\n", "0-3\n", "0-1023", &[0, 2, 3]),
            ("0\n", "0\n", "0", &[0]),
            ("", "0\n", "0", &[]),
            ("0-4294967295\n", "0-x\n", "-", &[]),
        ] {
            let (_dir, sources) = lay(with_memory, with_cpu, allowed);
            assert_eq!(nodes(&sources), expected);
        }
    }

    #[test]
    fn a_machine_of_one_node_is_left_alone() {
        let (_dir, sources) = lay("0\n", "0\n", "0");
        assert!(matches!(spread(&sources), Placement::OneNode));
        assert_eq!(asked().0, libc::MPOL_DEFAULT);
    }

    #[test]
    fn memory_goes_to_the_nodes_by_turns_and_a_policy_of_before_stays() {
        // This machine may have one node only, which the kernel then makes of the list.
        let (_dir, sources) = lay("0-1\n", "0-1\n", "0-1");
        assert!(matches!(spread(&sources), Placement::Spread(nodes) if nodes == [0, 1]));
        let (mode, mask) = asked();
        assert_eq!((mode, mask[0] & 1), (libc::MPOL_INTERLEAVE, 1));
        assert!(matches!(spread(&sources), Placement::AsStarted));
    }

    #[test]
    fn nodes_that_are_not_there_are_refused() {
        let (_dir, sources) = lay("1000-1001\n", "1000-1001\n", "1000-1001");
        assert!(matches!(spread(&sources), Placement::Refused(_)));
        assert_eq!(asked().0, libc::MPOL_DEFAULT);
    }
}
