"""An engine of two processes on a real server, its worker storing without end, and a look past them all at the arena.

The canary is a word of each 256 KiB of the arena, read through the segment's file.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import kvmp
from kvmp.client import Answer, Client
from kvmp.server import Server
from tests.gpu.actor import BLOCK_BYTES, hashes_of, spec
from tests.gpu.rig import WATCHDOG_S, until

ROOT = Path(__file__).parents[2]
ARENA = 1 << 30
PAGE = 4096
SLOTS = ARENA // BLOCK_BYTES
BLOCKS = 192
MODEL = "deaths"
STEP = 256 << 10
HOLDERS_AT, HOLDERS_BYTES = 4096, 4096 * 64
F_OFD_GETLK = 36

assert BLOCKS <= SLOTS // 2, "one engine may write half of the arena at most"


class Arena:
    """A look at the arena and at the holder entries, past every server and client."""

    def __init__(self, path: Path, chunk_bytes: int):
        self._file = path.open("r+b")
        self._chunk_bytes = chunk_bytes
        size = path.stat().st_size
        whole = np.memmap(self._file, np.int64, "r", offset=0, shape=(size // 8,))
        self._words = whole[(size - ARENA) // 8 :: STEP // 8]

    def words(self) -> np.ndarray:
        """The canary of the whole arena."""
        return np.array(self._words)

    def words_of(self, slots: set[int]) -> np.ndarray:
        """The canary of some slots."""
        # A slot's number: the pages of the chunks before its own, and its index in that.
        chunk, index = np.divmod(np.array(sorted(slots), np.int64), self._chunk_bytes // PAGE)
        first = (chunk * self._chunk_bytes + index * BLOCK_BYTES) // STEP
        return self.words()[first[:, None] + np.arange(BLOCK_BYTES // STEP)]

    def is_held(self) -> bool:
        """Whether any holder entry is locked by somebody else."""
        return is_locked(self._file)

    def close(self) -> None:
        self._file.close()


def is_locked(file: BinaryIO) -> bool:
    """Whether another description of the segment's file has a lock on a holder entry."""
    ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, HOLDERS_AT, HOLDERS_BYTES, 0)
    kind = struct.unpack("hhqqi4x", fcntl.fcntl(file, F_OFD_GETLK, ask))[0]
    return kind != fcntl.F_UNLCK


class Actor:
    """A process of tests.gpu.actor."""

    def __init__(self, role: str, **options: Any):
        command = [sys.executable, str(ROOT / "tests" / "gpu" / "actor.py"), role, json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def hear(self, limit_s: float = WATCHDOG_S) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"the actor says nothing: {self.process.poll()}"
        return json.loads(line)

    def kill(self) -> None:
        """SIGKILL; returns at once."""
        self.process.kill()

    def finish(self) -> None:
        """Tells it to end in order; returns when it has."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WATCHDOG_S) == 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def acting(role: str, **options: Any) -> Iterator[Actor]:
    actor = Actor(role, **options)
    try:
        yield actor
    finally:
        actor.close()


@contextmanager
def serving(name: str) -> Iterator[Callable[[], Server]]:
    """Starts servers on one segment, which goes with the test."""
    servers: list[Server] = []

    def start() -> Server:
        server = kvmp.launch(f"{ARENA >> 20}MiB", name=f"gpu-{name}-{os.getpid()}", ephemeral=False)
        servers.append(server)
        until("the server has its memory", lambda: not stats(server)["warming"])
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.close()
        for server in servers:
            server.segment_path.unlink(missing_ok=True)


def stats(server: Server) -> dict[str, Any]:
    """The server's counters now; no session of ours is left behind."""
    with Client.connect(server.endpoint, role="tool") as tool:
        return tool.stats()


def unsettled(server: Server) -> int:
    """Slots that somebody may still be writing to."""
    now = stats(server)
    return now["blocks_writing"] + now["blocks_quarantined"]


@contextmanager
def all_that_is_to_be_had(server: Server, layout: dict[str, Any]) -> Iterator[set[int]]:
    """The slots that two other engines are granted, half the arena each at most; given back at the end."""
    held = unsettled(server)
    with ExitStack() as stack:
        slots: set[int] = set()
        for model in ("first other", "second other"):
            client = stack.enter_context(Client.connect(server.endpoint))
            namespace = client.open(spec(layout, model))
            asked = client.reserve(namespace, hashes_of(model, SLOTS), first_block=0, timeout_ms=10_000)
            lease = stack.enter_context(asked)
            slots |= set(lease.slots[lease.answers == Answer.GRANTED].tolist())
        yield slots
    until("they are given back", lambda: unsettled(server) == held)


@dataclass
class Stage:
    """The engine whose worker stores, commits nothing and is to die."""

    server: Server
    start: Callable[[], Server]
    """Starts the next server on the segment."""
    scheduler: Actor
    worker: Actor
    arena: Arena
    layout: dict[str, Any]
    slots: set[int]
    """What its worker writes."""

    def copies_on(self) -> None:
        """Returns when its worker has written all of its slots anew, twice."""
        newest = self.arena.words_of(self.slots).max()
        until("the worker copies on", lambda: self.arena.words_of(self.slots).min() >= newest + 2)

    def found(self, server: Server) -> int:
        """How many of its blocks another engine finds."""
        with Client.connect(server.endpoint) as client:
            namespace = client.open(spec(self.layout, MODEL))
            with client.lookup(namespace, hashes_of(MODEL, BLOCKS), timeout_ms=10_000) as hit:
                return len(hit.slots())

    def kill_scheduler(self) -> None:
        """Returns when the server has noticed."""
        until("its two sessions and ours", lambda: stats(self.server)["sessions"] == 3)
        self.scheduler.kill()
        self.scheduler.process.wait()
        until("its scheduler's session has ended", lambda: stats(self.server)["sessions"] == 2)

    def come_back(self, server: Server) -> None:
        """Returns when nobody may write to any slot, with all of them to be had again and none of the blocks found."""
        until("the slots come back", lambda: unsettled(server) == 0)
        assert self.found(server) == 0
        with all_that_is_to_be_had(server, self.layout) as slots:
            assert len(slots) == SLOTS


@contextmanager
def staged(name: str, layout: dict[str, Any], depth: int) -> Iterator[Stage]:
    """Once the worker's copies are under way, `depth` at once."""
    with ExitStack() as stack:
        start = stack.enter_context(serving(name))
        server = start()
        options: dict[str, Any] = {"endpoint": server.endpoint, "blocks": BLOCKS}
        scheduler = stack.enter_context(acting("scheduler", layout=layout, model=MODEL, **options))
        options |= scheduler.hear()
        worker = stack.enter_context(acting("worker", depth=depth, **options))
        worker.hear()
        arena = Arena(server.segment_path, stats(server)["chunk_bytes"])
        stack.callback(arena.close)
        stage = Stage(server, start, scheduler, worker, arena, layout, set(options["slots"]))
        assert len(stage.slots) == BLOCKS
        stage.copies_on()
        yield stage
