"""The arena's memory on a machine of several NUMA nodes; elsewhere skipped by name."""

import mmap
import re
import time
from pathlib import Path

import pytest

import kvmp
from kvmp.client import Client

NODES = Path("/sys/devices/system/node")
POPULATE_READ = 22
ARENA = 256 << 20


def nodes() -> set[int]:
    """Those with memory and processors that this process may use."""
    allowed = re.search(r"^Mems_allowed_list:\s*(.*)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    lists = [(NODES / name).read_text() for name in ("has_memory", "has_cpu")] if NODES.exists() else []
    return set.intersection(*map(numbers, [*lists, allowed[1] if allowed else ""]))


def numbers(ranges: str) -> set[int]:
    """Of a list as the kernel writes it, `0-1,4`."""
    found = re.findall(r"(\d+)(?:-(\d+))?", ranges)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


@pytest.mark.skipif(len(nodes()) < 2, reason="one NUMA node")
def test_the_arena_lies_on_all_nodes_in_equal_shares():
    with kvmp.launch(f"{ARENA >> 20}MiB") as server:
        with Client.connect(server.endpoint, role="tool") as tool:
            while tool.stats()["warming"]:
                time.sleep(0.01)
        pages = pages_by_node(server.segment_path)
    assert sum(pages.values()) == ARENA // mmap.PAGESIZE
    assert pages.keys() == nodes()
    assert max(pages.values()) < 1.5 * min(pages.values()), pages


def pages_by_node(path: Path) -> dict[int, int]:
    """Of the arena, which is the end of the file: before it are pages that nobody has written, so are nowhere."""
    offset = path.stat().st_size - ARENA
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), ARENA, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as mapped,
    ):
        mapped.madvise(POPULATE_READ)
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
        # Clients in this process may have mapped parts of the file too.
        counts = [re.findall(r" N(\d+)=(\d+)", line) for line in lines if f"file={path} " in line]
        mappings = [{int(node): int(count) for node, count in mapping} for mapping in counts]
        return max(mappings, key=lambda pages: sum(pages.values()))
