"""SIGSTOP that has taken place: a signal sent is not yet a process that stands still."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WATCHDOG_S = 60.0


def stop(pid: int) -> None:
    """Return once every thread of the process stands still."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _WATCHDOG_S
    while not stands_still(pid):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


def stands_still(pid: int) -> bool:
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return bool(states) and set(states) == {"T"}


def go_on(pid: int) -> None:
    """A process that has ended meanwhile need not."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still for as long as the block lasts."""
    stop(pid)
    try:
        yield
    finally:
        go_on(pid)
