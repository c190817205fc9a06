"""The machine: shared memory, memory, limits, huge pages, the folder of the socket."""

import os
import resource
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvmp._kvmp import default_socket, lies_in_memory
from kvmp.memory import ARENA_DIR, MemoryBound, memory_bounds

from .finding import Finding, fail, ok, warn

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_GIB = 1 << 30
_LEAST_SHM = _GIB  # Docker's default is 64 MiB, which holds a few hundred tokens of a large model
_LEAST_FILES = 1024


def check() -> Iterator[Finding]:
    """Every check of the machine."""
    yield shared_memory()
    yield memory(memory_bounds())
    yield from limits()
    yield huge_pages()


def gib(count: int) -> str:
    """Bytes for a person."""
    return f"{count / _GIB:.1f} GiB"


def shared_memory(folder: Path = Path(ARENA_DIR)) -> Finding:
    what = "shared memory"
    if not folder.is_dir():
        return fail(what, f"{folder} is missing", f"mount -t tmpfs -o size=50% tmpfs {folder}")
    if not lies_in_memory(str(folder)):
        return fail(
            what, f"{folder} is no file system in memory", f"mount -t tmpfs -o size=50% tmpfs {folder} (as root)"
        )
    if not os.access(folder, os.W_OK):
        return fail(what, f"{folder} cannot be written by uid {os.geteuid()}", f"chmod 1777 {folder} (as root)")
    there = os.statvfs(folder)
    size, free = there.f_blocks * there.f_frsize, there.f_bavail * there.f_frsize
    if size == 0:  # as a tmpfs says that was mounted with size=0
        return ok(what, f"{folder}: no limit of its own")
    says = f"{folder}: {gib(free)} free of {gib(size)}"
    if size < _LEAST_SHM:
        mend = f"docker run --shm-size=16g, or as root: mount -o remount,size=50% {folder}"
        return fail(what, f"{says}; the arena lies there", mend)
    return ok(what, says)


def memory(bounds: Sequence[MemoryBound]) -> Finding:
    """Judges what bounds an arena's memory, the one with least free first."""
    tightest = bounds[0]
    says = f"{gib(tightest.free)} free of {gib(tightest.total)}, by {tightest.what}"
    return warn("memory", says, tightest.mend) if tightest.free < _LEAST_SHM else ok("memory", says)


def limits() -> Iterator[Finding]:
    """Limits of this process, which a server or an engine started from the same shell would have."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"{_bound(files)}, at most {_bound(hard)}"
    if hard != resource.RLIM_INFINITY and hard < _LEAST_FILES:
        yield warn(
            "open files", f"{says}; a session takes a few", "as root: ulimit -Hn 65536; or LimitNOFILE= of the service"
        )
    else:
        yield ok("open files", says)
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size == resource.RLIM_INFINITY:
        yield ok("file size", "no limit")
    else:
        yield fail(
            "file size",
            f"at most {size} bytes; the segment is one file",
            "ulimit -f unlimited (as root, where the limit is a hard one)",
        )
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space == resource.RLIM_INFINITY:
        yield ok("address space", "no limit")
    else:
        yield warn("address space", f"at most {gib(space)}; every process maps the whole arena", "ulimit -v unlimited")


def _bound(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else str(value)


def huge_pages(setting: Path = HUGE_PAGES) -> Finding:
    try:
        text = setting.read_text()
    except OSError:
        return ok("huge pages", "this kernel has none for shared memory; 4 KiB pages serve")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "within_size", "force"):
        return ok("huge pages", f"on for shared memory ({chosen})")
    mend = f"as root, before the server starts: echo within_size > {setting}"
    return warn("huge pages", f"off for shared memory ({chosen}): each process maps the arena in 4 KiB pages", mend)


def socket_folder(named: Path | None = None) -> Finding:
    """Judges the folder in which servers and clients meet; the default one where none is named."""
    what = "socket folder"
    folder = named or Path(default_socket("kvmp")).parent
    another = "name another one in kvmp.endpoint (and kvmp serve --socket PATH)"
    try:
        there = folder.stat()
    except FileNotFoundError:
        if named is None:
            return ok(what, f"{folder} is made by the first server")
        return warn(what, f"{folder} is not there", "a server makes it; in a container, map the server's folder to it")
    except OSError as error:
        return fail(what, f"{folder}: {error.strerror}", another)
    if not stat.S_ISDIR(there.st_mode):
        return fail(what, f"{folder} is not a folder", another)
    if there.st_uid not in (os.geteuid(), 0):
        mend = f"run as that user, or {another}"
        return fail(what, f"{folder} belongs to uid {there.st_uid}, this is uid {os.geteuid()}", mend)
    if not os.access(folder, os.X_OK):
        return fail(what, f"{folder} may not be entered by uid {os.geteuid()}", f"run as its owner, or {another}")
    if there.st_mode & 0o022:
        return warn(what, f"{folder} can be written by others", f"chmod go-w {folder}")
    return ok(what, f"{folder}, mode {stat.S_IMODE(there.st_mode):04o}")
