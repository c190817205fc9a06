"""What bounds the memory of an arena on this machine, as the server itself reads it."""

from dataclasses import dataclass

from ._kvmp import memory_bounds as _memory_bounds

ARENA_DIR = "/dev/shm"
"""Where ``kvmp serve`` makes its segment when it is given no folder."""


@dataclass(frozen=True)
class MemoryBound:
    """The file system, the machine, or a memory cgroup (v1 or v2, those that hold this one too)."""

    what: str
    """What it is, in words."""
    total: int
    """Bytes it could ever give."""
    free: int
    """Bytes it has free now."""
    mend: str
    """What makes it larger."""


def memory_bounds(arena_dir: str = ARENA_DIR) -> list[MemoryBound]:
    """Everything that bounds memory taken in ``arena_dir`` now, the one with least free first."""
    bounds = (MemoryBound(*bound) for bound in _memory_bounds(arena_dir))
    return sorted(bounds, key=lambda bound: bound.free)
