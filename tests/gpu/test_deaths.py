"""Processes killed while the GPU copies into the arena: when the last byte lands, and what the server makes of it.

The canary is a word of each 256 KiB of the arena, read through the segment's file until none changes any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvmp  # noqa: E402
from kvmp.client import Answer, Client  # noqa: E402
from kvmp.paged import PagedKV  # noqa: E402
from kvmp.server import Server  # noqa: E402
from tests.gpu.actor import BLOCK_BYTES, cache, spec  # noqa: E402
from tests.gpu.rig import Rig, until  # noqa: E402

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
ARENA = 1 << 30
BLOCKS = 192
GRACE_S = 1.0  # DMA_GRACE of rust/kvmp-server/src/plane/engines.rs
STEP = 256 << 10
HOLDERS_AT, HOLDERS_BYTES = 4096, 4096 * 64
F_OFD_GETLK = 36


class Arena:
    """A look at the arena and at the holder entries, past every server and client."""

    def __init__(self, path: Path):
        self._file = path.open("r+b")
        size = path.stat().st_size
        whole = np.memmap(self._file, np.int64, "r", offset=0, shape=(size // 8,))
        self._words = whole[(size - ARENA) // 8 :: STEP // 8]

    def words(self) -> np.ndarray:
        return np.array(self._words)

    def is_held(self) -> bool:
        """Whether any holder entry is locked by somebody else."""
        ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, HOLDERS_AT, HOLDERS_BYTES, 0)
        kind = struct.unpack("hhqqi4x", fcntl.fcntl(self._file, F_OFD_GETLK, ask))[0]
        return kind != fcntl.F_UNLCK

    def close(self) -> None:
        self._file.close()


class Actor:
    """A process of tests.gpu.actor."""

    def __init__(self, role: str, **options: Any):
        command = [sys.executable, str(ROOT / "tests" / "gpu" / "actor.py"), role, json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def hear(self, limit_s: float = 60.0) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"the actor says nothing: {self.process.poll()}"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()

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
        with Client.connect(server.endpoint, role="tool") as tool:
            until("the server has its memory", lambda: not tool.stats()["warming"])
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.close()
        servers[0].segment_path.unlink(missing_ok=True)


def reserved(client: Client, namespace: Any, count: int) -> Any:
    """The slots of up to `count` new blocks that the server grants now."""
    hashes = np.frombuffer(os.urandom(32 * count), np.uint8).reshape(-1, 32)
    lease = client.reserve(namespace, hashes, first_block=0, timeout_ms=10_000)
    lease.handed_over()
    return lease


def seconds_to_rest(arena: Arena, watch_s: float) -> tuple[float, float, int]:
    """Seconds from now to the last change of a word and to free holder entries, and how often words changed."""
    begun, last, free, changes, before = time.perf_counter(), 0.0, float("nan"), 0, arena.words()
    while (now := time.perf_counter() - begun) < watch_s:
        words = arena.words()
        if not np.array_equal(words, before):
            last, changes, before = now, changes + 1, words
        if np.isnan(free) and not arena.is_held():
            free = now
    return last, free, changes


@pytest.mark.parametrize("depth", [1, 24])
def test_the_last_byte_of_a_killed_worker_lands_long_before_its_slots_are_granted_anew(depth: int) -> None:
    _, paged = cache(1)
    with serving(f"worker-{depth}") as start:
        server = start()
        with Client.connect(server.endpoint) as scheduler:
            namespace = scheduler.open(spec(paged.layout(), "deaths"))
            lease = reserved(scheduler, namespace, BLOCKS)
            assert len(lease.slots) == BLOCKS
            options = {"token": scheduler.engine_token, "namespace": namespace.id, "digest": namespace.digest}
            with acting(
                "worker", endpoint=server.endpoint, blocks=BLOCKS, slots=lease.slots.tolist(), depth=depth, **options
            ) as worker:
                worker.hear()
                arena = Arena(server.segment_path)
                before = arena.words()
                until("the canary changes", lambda: not np.array_equal(arena.words(), before))
                with Client.connect(server.endpoint, role="tool") as tool:
                    assert tool.stats()["blocks_writing"] == BLOCKS
                    killed = time.perf_counter()
                    worker.kill()
                    # The scheduler's own entry stays held: it has a session too.
                    last, _, changes = seconds_to_rest(arena, 0.4)
                    until(
                        "the slots come back",
                        lambda: tool.stats()["blocks_writing"] + tool.stats()["blocks_quarantined"] == 0,
                    )
                    back = time.perf_counter() - killed
                print(f"depth {depth}: {changes} changes, the last {last * 1e3:.1f} ms after the kill")
                print(f"depth {depth}: slots back {back:.2f} s after the kill")
                assert back >= GRACE_S
                assert last < GRACE_S / 4, "the grace is to be four times what is ever seen"
                rest = arena.words()
                others = reserved(scheduler, namespace, BLOCKS)
                assert len(others.slots) == BLOCKS
                time.sleep(0.2)
                assert np.array_equal(arena.words(), rest), "a byte landed in slots that were granted anew"
                others.cancel()
                arena.close()


def test_the_holder_entry_of_a_killed_worker_is_free_after_its_last_byte() -> None:
    """With nobody else attached, so that the entries are the worker's alone."""
    _, paged = cache(1)
    with serving("holder") as start:
        server = start()
        with acting(
            "scheduler", endpoint=server.endpoint, blocks=BLOCKS, layout=paged.layout(), model="deaths"
        ) as scheduler:
            facts = scheduler.hear()
            options = {key: facts[key] for key in ("token", "namespace", "digest", "slots")}
            with acting("worker", endpoint=server.endpoint, blocks=BLOCKS, depth=8, **options) as worker:
                worker.hear()
                arena = Arena(server.segment_path)
                scheduler.kill()
                scheduler.process.wait()
                time.sleep(0.5)
                assert arena.is_held(), "the worker's entry: it copies on without its scheduler"
                before = arena.words()
                until("the canary changes", lambda: not np.array_equal(arena.words(), before))
                with Client.connect(server.endpoint, role="tool") as tool:
                    assert tool.stats()["blocks_ready"] == 0
                    assert tool.stats()["blocks_writing"] + tool.stats()["blocks_quarantined"] == BLOCKS, (
                        "slots that a living worker writes were given away"
                    )
                worker.kill()
                last, free, changes = seconds_to_rest(arena, 1.0)
                print(f"{changes} changes, the last {last * 1e3:.1f} ms after the kill; entry free {free * 1e3:.1f} ms")
                assert last <= free + GRACE_S / 4
                assert not arena.is_held()
                arena.close()


def test_a_server_killed_in_mid_copy_gives_the_slots_to_nobody_while_the_worker_copies() -> None:
    """Its successor grants another engine all that it has, at once: none of it is what the old worker writes."""
    tensor, paged = cache(BLOCKS)
    with serving("server") as start:
        server = start()
        with acting(
            "scheduler", endpoint=server.endpoint, blocks=BLOCKS, layout=paged.layout(), model="deaths"
        ) as scheduler:
            facts = scheduler.hear()
            options = {key: facts[key] for key in ("token", "namespace", "digest", "slots")}
            with acting("worker", endpoint=server.endpoint, blocks=BLOCKS, depth=8, **options) as worker:
                worker.hear()
                arena = Arena(server.segment_path)
                server.kill()
                successor = start()
                before = arena.words()
                until("the worker copies on", lambda: not np.array_equal(arena.words(), before))
                with Client.connect(successor.endpoint) as other:
                    namespace = other.open(spec(paged.layout(), "another"))
                    with Client.connect(
                        successor.endpoint, role="worker", engine_token=other.engine_token, part=0, dma=True
                    ) as writer:
                        joined = writer.join(namespace.id, namespace.digest, json.dumps(paged.layout()))
                        rig = Rig(successor, other, writer, namespace, joined)
                        check_that_others_are_left_alone(rig, paged, tensor, set(facts["slots"]))
                        before = arena.words()
                        until("the worker copies on still", lambda: not np.array_equal(arena.words(), before))
                worker.kill()
                scheduler.kill()
                with Client.connect(successor.endpoint, role="tool") as tool:
                    until("the slots come back", lambda: tool.stats()["blocks_quarantined"] == 0)
                arena.close()


def check_that_others_are_left_alone(rig: Rig, paged: PagedKV, tensor: Any, taken: set[int]) -> None:
    hashes = np.frombuffer(os.urandom(32 * BLOCKS), np.uint8).reshape(-1, 32)
    lease = rig.scheduler.reserve(rig.namespace, hashes, first_block=0, timeout_ms=10_000)
    lease.handed_over()
    granted = int((lease.answers == Answer.GRANTED).sum())
    assert granted > 16
    assert not taken & set(lease.slots.tolist())
    tensor[:granted] = -5
    paged.store(rig.worker, rig.joined, np.arange(granted), lease.slots)
    rig.commit(lease)
    tensor.zero_()
    time.sleep(0.3)
    hit = rig.lookup(hashes[:granted])
    assert paged.load(rig.worker, rig.joined, np.arange(granted), hit.slots(), hit.words()).all()
    assert (tensor[:granted] == -5).all(), "another worker's bytes landed in this engine's blocks"
    hit.release()


def test_the_look_at_locks_sees_one() -> None:
    """The struct that asks for locks is the kernel's: with a lock of one's own on another description it sees it."""
    path = Path("/dev/shm") / f"gpu-locks-{os.getpid()}"
    path.write_bytes(bytes(HOLDERS_AT + HOLDERS_BYTES))
    try:
        with path.open("r+b") as holder, path.open("r+b") as looker:
            arena = Arena.__new__(Arena)
            arena._file = looker
            assert not arena.is_held()
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, HOLDERS_AT + 64 * 7, 1, 0)
            fcntl.fcntl(holder, 37, lock)  # F_OFD_SETLK
            assert arena.is_held()
    finally:
        path.unlink()


assert BLOCKS * BLOCK_BYTES <= ARENA // 2
