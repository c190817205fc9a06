"""How large a server is that nobody gave a size."""

import os
from pathlib import Path

from kvmp.errors import KvmpError

_GIB = 1 << 30
_ARENA_DIR = "/dev/shm"
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LEAST = 256 << 20


def default_size() -> str:
    """A quarter of the memory this cgroup may use, at most half of what is free in ``/dev/shm``, as in ``12GiB``.

    Raises ``KvmpError`` when that is less than 256 MiB.
    """
    there = os.statvfs(_ARENA_DIR)
    size = min(_memory() // 4, there.f_bavail * there.f_frsize // 2)
    if size < _LEAST:
        raise KvmpError(
            f"{_ARENA_DIR} has only {there.f_bavail * there.f_frsize >> 20} MiB free: make it larger "
            f"(docker run --shm-size=16g), or give --kvmp-size"
        )
    return f"{size // _GIB}GiB" if size >= _GIB else f"{size >> 20}MiB"


def _memory() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine
