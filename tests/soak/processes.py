"""The soak's processes, seen from outside: started, watched, stopped and killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from demo.processes import Process, processes_of_session
from tests.soak.engine import WORKER_GONE, WRONG_BYTES


class SoakEngine:
    """A slot for one engine: whoever is killed there is followed by another."""

    def __init__(self, endpoint: str, name: str):
        self._endpoint, self._name = endpoint, name
        self._lives = 0
        self._before: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        self._before += self._now
        self._now = Counter()
        self._lives += 1
        command = [sys.executable, "-m", "tests.soak.engine", self._endpoint, f"{self._name} {self._lives}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        threading.Thread(target=self._listen, args=(self._process,), name="soak-listener", daemon=True).start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stdout:
            self._now = Counter(json.loads(line))
        process.stdout.close()

    def counts(self) -> Counter[str]:
        return self._before + self._now

    def scheduler(self) -> list[Process]:
        return [process for process in self.processes() if process.pid == self._process.pid]

    def workers(self) -> list[Process]:
        return [process for process in self.processes() if "tests.soak.worker" in process.title]

    def processes(self) -> list[Process]:
        return processes_of_session(self._process.pid)

    def restart_if_ended(self) -> None:
        """Raises ``AssertionError`` for an engine that ended in a way that no deed explains."""
        code = self._process.poll()
        if code is None:
            return
        assert code != WRONG_BYTES, f"{self._name} was given another block's bytes"
        assert code in (WORKER_GONE, -signal.SIGKILL), f"{self._name} ended with code {code}"
        self.start()

    def kill(self) -> None:
        """All of it; returns when every process has ended."""
        while left := self.processes():
            for process in left:
                process.signal(signal.SIGKILL)
            self._process.wait()
        self._process.wait()


def server_load(pid: int) -> dict[str, int]:
    """Descriptors, threads and private memory (KiB) of a server."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "anonymous_kib": int(status["RssAnon"].split()[0]),
    }
