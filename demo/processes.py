"""The processes of a session (setsid), read from /proc."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process, as it was when looked at."""

    pid: int
    title: str
    """Its command line, which ``setproctitle`` may have set."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that ended meanwhile needs none."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def processes_of_session(session: int) -> list[Process]:
    """Every living process of a session; zombies are no longer living."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [Process(pid, _title(pid)) for pid in pids if _living_in(pid, session)]


def _living_in(pid: int, session: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # pid (comm) state ppid pgrp session ...; comm may hold spaces and parentheses
    state, _parent, _group, its_session = stat.rpartition(")")[2].split()[:4]
    return int(its_session) == session and state not in "ZX"


def _title(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
