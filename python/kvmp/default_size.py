"""How large a server is that nobody gave a size."""

from kvmp._kvmp import kept_arena_bytes
from kvmp.config.size import size_text
from kvmp.endpoint import server_name
from kvmp.errors import KvmpError
from kvmp.memory import ARENA_DIR, memory_bounds

_GIB = 1 << 30
_LEAST = 256 << 20


def default_size(endpoint: str) -> str:
    """As large as what the last server at ``endpoint`` left, so that it is found again; else a share of what is free.

    The share is a quarter of what is free on the machine, in its cgroups and in ``/dev/shm``, as in ``12GiB``.

    Raises ``KvmpError`` when that is less than 256 MiB.
    """
    if kept := kept_arena_bytes(server_name(endpoint), ARENA_DIR):
        return size_text(kept)
    return _share_of_free()


def _share_of_free() -> str:
    tightest = memory_bounds()[0]
    size = tightest.free // 4
    if size < _LEAST:
        raise KvmpError(
            f"no size was given, and a quarter of the {tightest.free >> 20} MiB that {tightest.what} has free is less "
            f"than {_LEAST >> 20} MiB: give --kvmp-size, or more memory ({tightest.mend})"
        )
    return f"{size // _GIB}GiB" if size >= _GIB else f"{size >> 20}MiB"
