"""The arena's memory on a machine of several NUMA nodes; elsewhere skipped by name."""

import mmap
import re
from pathlib import Path

import pytest

import kvmp
from kvmp.client import Client

NODES = Path("/sys/devices/system/node/has_memory")
POPULATE_READ = 22


def node_count() -> int:
    ranges = re.findall(r"(\d+)(?:-(\d+))?", NODES.read_text() if NODES.exists() else "0")
    return sum(int(last or first) - int(first) + 1 for first, last in ranges)


@pytest.mark.skipif(node_count() < 2, reason="one NUMA node")
def test_the_arena_lies_on_all_nodes_in_equal_shares():
    with kvmp.launch("256MiB") as server:
        with Client.connect(server.endpoint, role="tool") as tool:
            while tool.stats()["warming"]:
                pass
        pages = pages_by_node(server.segment_path)
    assert len(pages) == node_count()
    assert max(pages.values()) < 1.5 * min(pages.values()), pages


def pages_by_node(path: Path) -> dict[str, int]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        mapped.madvise(POPULATE_READ)
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
        # Clients in this process may have mapped parts of the file too.
        counts = [re.findall(r"(N\d+)=(\d+)", line) for line in lines if f"file={path} " in line]
        mappings = [{node: int(count) for node, count in mapping} for mapping in counts]
        return max(mappings, key=lambda pages: sum(pages.values()))
