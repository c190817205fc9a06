"""The soak's course: engines at work, a deed every moment, and at the end nothing left behind."""

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvmp
from demo.processes import Process
from kvmp.errors import KvmpError
from kvmp.server import Server
from tests.soak.processes import SoakEngine, server_load

_SIZE, _NAME = "128MiB", "soak"
_ENGINES = 2
_DEED_S = (0.1, 1.5)
_LONG_S = (0.5, 3.0)
_SETTLE_S = 60.0
_STILL_S = 0.5
# What a server may have more of at the end than when it had backed its memory and served nobody yet.
_SLACK = {"descriptors": 0, "threads": 0, "anonymous_kib": 8 << 10}
_MUST_HAPPEN = ("stored parts", "loaded parts", "abandoned lookups")


class Soak:
    """One run; ``close`` ends whatever is left of it."""

    def __init__(self, seed: str, *, spoil: bool = False):
        self._random = random.Random(seed)
        self._seed = seed
        self._folder = tempfile.TemporaryDirectory(prefix="kvmp-soak-")
        self._name = f"{_NAME}-{os.getpid()}"
        self._thaws: list[threading.Timer] = []
        self._frozen: list[Process] = []
        self._servers = [self._launch()]
        self._await_nothing_held()
        self._at_start = self._settled_load()
        endpoint = self._server.endpoint
        self._engines = [SoakEngine(endpoint, f"{seed} engine {number}") for number in range(_ENGINES)]
        self.deeds: Counter[str] = Counter()
        self._all: list[Callable[[], None]] = [
            self.kill_a_scheduler,
            self.kill_a_worker,
            self.kill_an_engine,
            self.stop_a_worker,
            self.stop_a_worker_and_kill_its_scheduler,
            self.stop_the_server,
            self.kill_the_server,
            self.restart_the_server,
        ]
        if spoil:
            self._all = [self.spoil]

    @property
    def _server(self) -> Server:
        return self._servers[-1]

    def _launch(self) -> Server:
        socket = Path(self._folder.name) / "kvmp.sock"
        return kvmp.launch(_SIZE, name=self._name, socket=socket, ephemeral=False)

    def run(self, seconds: float) -> None:
        """Does deeds for so long, and looks at what is left; ``AssertionError`` at the first fault."""
        print(f"soak: seed {self._seed}, {seconds:.0f} s", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._random.uniform(*_DEED_S))
            for engine in self._engines:
                engine.restart_if_ended()
            assert self._server.process.poll() is None, f"the server ended by itself:\n{self._server.log()[-2000:]}"
            deed = self._random.choice(self._all)
            deed()
            self.deeds[deed.__name__.replace("_", " ")] += 1
        self._finish()

    # ---- deeds

    def kill_a_scheduler(self) -> None:
        self._signal(self._engine().scheduler(), signal.SIGKILL)

    def kill_a_worker(self) -> None:
        self._signal(self._engine().workers()[:1], signal.SIGKILL)

    def kill_an_engine(self) -> None:
        self._signal(self._engine().processes(), signal.SIGKILL)

    def stop_a_worker(self) -> None:
        self._freeze(self._engine().workers()[-1:])

    def stop_a_worker_and_kill_its_scheduler(self) -> None:
        engine = self._engine()
        self._freeze(engine.workers()[:1])
        self._signal(engine.scheduler(), signal.SIGKILL)

    def stop_the_server(self) -> None:
        self._server.process.send_signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(*_LONG_S))
        self._server.process.send_signal(signal.SIGCONT)

    def kill_the_server(self) -> None:
        self._server.kill()
        time.sleep(self._random.choice((0.0, 1.0)))
        self._servers.append(self._launch())

    def restart_the_server(self) -> None:
        self._server.stop()
        self._servers.append(self._launch())

    def spoil(self) -> None:
        """Flips a byte of every page that holds any: what no run may stand."""
        segment = np.memmap(self._server.segment_path, np.uint8, mode="r+")
        arena = segment[segment.size - (128 << 20) :]
        arena[100::4096] ^= 1

    def _engine(self) -> SoakEngine:
        return self._random.choice(self._engines)

    def _freeze(self, processes: list[Process]) -> None:
        self._signal(processes, signal.SIGSTOP)
        thaw = threading.Timer(self._random.uniform(*_LONG_S), self._signal, (processes, signal.SIGCONT))
        thaw.start()
        self._thaws.append(thaw)
        self._frozen = [*self._frozen[-8:], *processes]  # of long ago none is frozen, and a pid may be another's by now

    @staticmethod
    def _signal(processes: list[Process], number: signal.Signals) -> None:
        for process in processes:
            process.signal(number)

    # ---- the end

    def _finish(self) -> None:
        counts = self._counts()
        self._end_engines()
        stats = self._await_nothing_held()
        left = self._settled_load()
        grown = {what: left[what] - self._at_start[what] for what in left}
        print(
            f"soak: deeds {dict(self.deeds)}\nsoak: {dict(counts)}\nsoak: grown {grown}, {stats['blocks_ready']} blocks"
        )
        assert all(grown[what] <= _SLACK[what] for what in grown), f"the server has more than at its start: {grown}"
        assert all(counts[what] for what in _MUST_HAPPEN), f"nothing was shown: {dict(counts)}"

    def _counts(self) -> Counter[str]:
        return sum((engine.counts() for engine in self._engines), Counter())

    def _end_engines(self) -> None:
        for thaw in self._thaws:
            thaw.join()
        for engine in self._engines:
            engine.restart_if_ended()  # whoever had wrong bytes says so here
            engine.kill()

    def _await_nothing_held(self) -> dict[str, Any]:
        held = ("warming", "blocks_writing", "blocks_quarantined", "read_leases", "write_leases", "engines")
        deadline = time.monotonic() + _SETTLE_S
        while True:
            stats = self._stats()
            still = {name: stats[name] for name in held if stats[name]}
            if not still and stats["sessions"] == 1:  # ours
                return stats
            assert time.monotonic() < deadline, f"held by nobody that lives: {still}, sessions {stats['sessions']}"
            time.sleep(0.05)

    def _settled_load(self) -> dict[str, int]:
        """Its load once that has stopped changing: the server closes what our own question took a moment later."""
        load, since = server_load(self._server.pid), time.monotonic()
        while time.monotonic() < since + _STILL_S:
            time.sleep(0.02)
            now = server_load(self._server.pid)
            if now["descriptors"] != load["descriptors"] or now["threads"] != load["threads"]:
                since = time.monotonic()
            load = now
        return load

    def _stats(self) -> dict[str, Any]:
        try:
            with kvmp.Client.connect(self._server.endpoint, role="tool") as client:
                return client.stats()
        except KvmpError as error:
            raise AssertionError(f"the server does not answer at the end: {error}") from error

    def close(self) -> None:
        for thaw in self._thaws:
            thaw.cancel()
        self._signal(self._frozen, signal.SIGCONT)  # whose scheduler is gone, they end by themselves
        for engine in self._engines:
            engine.kill()
        for server in self._servers:
            server.close()
        self._server.segment_path.unlink(missing_ok=True)
        self._folder.cleanup()
