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
from tests.serving import serve, take_over
from tests.soak.processes import SoakEngine, server_load

_SIZE, _NAME = "128MiB", "soak"
_ENGINES = 2
_DEED_S = (0.1, 1.5)
_LONG_S = (0.5, 3.0)
_SETTLE_S = 60.0
_AT_WORK_S = 60.0
_STILL_S = 0.5
# What a server may have more of at the end than when it had backed its memory and served nobody yet.
_SLACK = {"descriptors": 0, "threads": 0, "anonymous_kib": 8 << 10}
_MUST_HAPPEN = ("stored parts", "loaded parts", "abandoned lookups", "blocks kept by upgrades")

Deed = Callable[[], bool]
"""Says whether it was done: whom it is meant for may not be there."""


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
        self._kept_by_upgrades = 0
        self._deck: list[Deed] = []
        self._all: list[Deed] = [
            self.kill_a_scheduler,
            self.kill_a_worker,
            self.kill_an_engine,
            self.stop_a_worker,
            self.stop_a_worker_and_kill_its_scheduler,
            self.stop_the_server,
            self.kill_the_server,
            self.restart_the_server,
            self.upgrade_the_server,
        ]
        if spoil:
            self._all = [self.spoil]

    @property
    def _server(self) -> Server:
        return self._servers[-1]

    def _launch(self) -> Server:
        return serve(_SIZE, name=self._name, socket=Path(self._folder.name) / "kvmp.sock")

    def run(self, seconds: float) -> None:
        """Does deeds for so long, each of them once at least; ``AssertionError`` at the first fault."""
        print(f"soak: seed {self._seed}, {seconds:.0f} s", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(self.deeds) < len(self._all):
            time.sleep(self._random.uniform(*_DEED_S))
            self._look_after_all()
            deed = self._next_deed()
            if deed():
                self.deeds[deed.__name__.replace("_", " ")] += 1
            else:
                self._deck.insert(0, deed)
        self._finish()

    def _next_deed(self) -> Deed:
        """In an order by chance, none a second time before every other was done."""
        if not self._deck:
            self._deck = self._random.sample(self._all, len(self._all))
        return self._deck.pop()

    def _look_after_all(self) -> None:
        for engine in self._engines:
            engine.restart_if_ended()
        assert self._server.process.poll() is None, f"the server ended by itself:\n{self._server.log()[-2000:]}"

    # ---- deeds

    def kill_a_scheduler(self) -> bool:
        return self._signal(self._engine().scheduler(), signal.SIGKILL)

    def kill_a_worker(self) -> bool:
        return self._signal(self._engine().workers()[:1], signal.SIGKILL)

    def kill_an_engine(self) -> bool:
        return self._signal(self._engine().processes(), signal.SIGKILL)

    def stop_a_worker(self) -> bool:
        return self._freeze(self._engine().workers()[-1:])

    def stop_a_worker_and_kill_its_scheduler(self) -> bool:
        engine = self._engine()
        return self._freeze(engine.workers()[:1]) and self._signal(engine.scheduler(), signal.SIGKILL)

    def stop_the_server(self) -> bool:
        self._server.process.send_signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(*_LONG_S))
        self._server.process.send_signal(signal.SIGCONT)
        return True

    def kill_the_server(self) -> bool:
        self._server.kill()
        time.sleep(self._random.choice((0.0, 1.0)))
        self._servers.append(self._launch())
        return True

    def restart_the_server(self) -> bool:
        self._server.stop()
        self._servers.append(self._launch())
        return True

    def upgrade_the_server(self) -> bool:
        """A warm takeover, while every engine is at work."""
        self._await_all_at_work()
        self._servers.append(take_over(self._server, _SIZE, name=self._name))
        self._kept_by_upgrades += self._stats()["recovered_blocks"]
        return True

    def _await_all_at_work(self) -> None:
        """Every engine has got something stored or loaded since now."""
        deadline, before = time.monotonic() + _AT_WORK_S, [_work(engine) for engine in self._engines]
        while not all(_work(engine) > was for engine, was in zip(self._engines, before, strict=True)):
            self._look_after_all()
            assert time.monotonic() < deadline, f"engines do not go on: {[_work(each) for each in self._engines]}"
            time.sleep(0.02)

    def spoil(self) -> bool:
        """Flips a byte of every page that holds any: what no run may stand."""
        segment = np.memmap(self._server.segment_path, np.uint8, mode="r+")
        arena = segment[segment.size - (128 << 20) :]
        arena[100::4096] ^= 1
        return True

    def _engine(self) -> SoakEngine:
        return self._random.choice(self._engines)

    def _freeze(self, processes: list[Process]) -> bool:
        done = self._signal(processes, signal.SIGSTOP)
        thaw = threading.Timer(self._random.uniform(*_LONG_S), self._signal, (processes, signal.SIGCONT))
        thaw.start()
        self._thaws.append(thaw)
        self._frozen = [*self._frozen[-8:], *processes]  # of long ago none is frozen, and a pid may be another's by now
        return done

    @staticmethod
    def _signal(processes: list[Process], number: signal.Signals) -> bool:
        """Whether there was anybody."""
        for process in processes:
            process.signal(number)
        return bool(processes)

    # ---- the end

    def _finish(self) -> None:
        counts = self._counts() + Counter({"blocks kept by upgrades": self._kept_by_upgrades})
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


def _work(engine: SoakEngine) -> int:
    counts = engine.counts()
    return counts["stored parts"] + counts["loaded parts"]
