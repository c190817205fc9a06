"""Processes killed while the GPU copies into the arena: when the last byte lands, and what the server makes of it."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmp.paged import PagedKV  # noqa: E402
from kvmp.server import Server  # noqa: E402
from tests.gpu.actor import cache  # noqa: E402
from tests.gpu.rig import engine, until  # noqa: E402
from tests.gpu.stage import (  # noqa: E402
    BLOCKS,
    HOLDERS_AT,
    HOLDERS_BYTES,
    SLOTS,
    Arena,
    Stage,
    all_that_is_to_be_had,
    is_locked,
    staged,
    stats,
    unsettled,
)

pytestmark = pytest.mark.gpu

GRACE_S = 1.0  # DMA_GRACE of rust/kvmp-server/src/plane/engines.rs
F_OFD_SETLK = 37


def layout() -> dict[str, Any]:
    return cache(1)[1].layout()


def seconds_to_rest(arena: Arena, watch_s: float) -> tuple[float, float, int]:
    """Seconds from now to the last change of a word and to free holder entries, and how often words changed.

    A watch of so many seconds: what it looks for is that nothing comes after the last change.
    """
    begun, last, free, changes, before = time.perf_counter(), 0.0, float("nan"), 0, arena.words()
    while (now := time.perf_counter() - begun) < watch_s:
        words = arena.words()
        if not np.array_equal(words, before):
            last, changes, before = now, changes + 1, words
        if np.isnan(free) and not arena.is_held():
            free = now
    return last, free, changes


def check_that_nothing_lands_for(watch_s: float, arena: Arena) -> None:
    """A watch over a period in which no word of the arena may change."""
    _, _, changes = seconds_to_rest(arena, watch_s)
    assert changes == 0, "a byte landed after its writer's slots had come back"


@pytest.mark.parametrize("depth", [1, 24])
def test_the_last_byte_of_a_killed_worker_lands_long_before_its_slots_are_granted_anew(depth: int) -> None:
    with staged(f"worker-{depth}", layout(), depth) as stage:
        assert stats(stage.server)["blocks_writing"] == BLOCKS
        killed = time.perf_counter()
        stage.worker.kill()
        # The scheduler's own entry stays held: it has a session too.
        last, _, changes = seconds_to_rest(stage.arena, 0.4)
        until("the slots come back", lambda: unsettled(stage.server) == 0)
        back = time.perf_counter() - killed
        print(f"depth {depth}: {changes} changes, the last {last * 1e3:.1f} ms after the kill")
        print(f"depth {depth}: slots back {back:.2f} s after the kill")
        assert back >= GRACE_S
        assert last < GRACE_S / 4, "the grace is to be four times what is ever seen"
        stage.come_back(stage.server)
        with all_that_is_to_be_had(stage.server, stage.layout) as slots:
            assert slots >= stage.slots
            check_that_nothing_lands_for(0.2, stage.arena)


def test_the_holder_entry_of_a_killed_worker_is_free_after_its_last_byte() -> None:
    """With nobody else attached, so that the entries are the worker's alone."""
    with staged("holder", layout(), 8) as stage:
        stage.kill_scheduler()
        assert stage.arena.is_held(), "the worker's entry: it copies on without its scheduler"
        stage.copies_on()
        stage.worker.kill()
        last, free, changes = seconds_to_rest(stage.arena, 1.0)
        print(f"{changes} changes, the last {last * 1e3:.1f} ms after the kill; entry free {free * 1e3:.1f} ms")
        assert last <= free + GRACE_S / 4
        assert not stage.arena.is_held()


@pytest.mark.parametrize("end", ["killed", "done"])
def test_a_killed_schedulers_slots_are_nobodys_until_its_worker_is_gone(end: str) -> None:
    with staged(f"scheduler-{end}", layout(), 8) as stage:
        stage.kill_scheduler()
        assert unsettled(stage.server) == BLOCKS
        with all_that_is_to_be_had(stage.server, stage.layout) as slots:
            assert not slots & stage.slots, "slots that a living worker writes were given away"
            assert len(slots) == SLOTS - BLOCKS, "there was more to be had"
            others = stage.arena.words_of(slots)
            stage.copies_on()
            assert np.array_equal(stage.arena.words_of(slots), others), "bytes landed in slots of another engine"
            assert unsettled(stage.server) == SLOTS
        assert stage.found(stage.server) == 0
        stage.copies_on()
        if end == "killed":
            stage.worker.kill()
        else:
            stage.worker.finish()
        stage.come_back(stage.server)
        check_that_nothing_lands_for(0.2, stage.arena)


def test_a_server_killed_in_mid_copy_gives_the_slots_to_nobody_while_the_worker_copies() -> None:
    """Its successor grants others all that it has, at once: none of it is what the old worker writes."""
    tensor, paged = cache(BLOCKS)
    with staged("server", paged.layout(), 8) as stage:
        stage.server.kill()
        successor = stage.start()
        with all_that_is_to_be_had(successor, stage.layout) as slots:
            assert not slots & stage.slots, "slots that a living worker writes were given away"
            assert len(slots) == SLOTS - BLOCKS, "there was more to be had"
            stage.copies_on()
        check_that_another_engine_is_left_alone(stage, successor, paged, tensor)
        stage.copies_on()
        assert stage.found(successor) == 0
        stage.worker.kill()
        stage.scheduler.kill()
        stage.come_back(successor)


def check_that_another_engine_is_left_alone(stage: Stage, server: Server, paged: PagedKV, tensor: Any) -> None:
    """It stores, the old worker goes on, and it loads what it had stored."""
    ids = np.arange(BLOCKS)
    with engine(server, paged, "another") as rig:
        hashes, lease = rig.reserve(BLOCKS)
        assert not stage.slots & set(lease.slots.tolist()), "slots that a living worker writes were given away"
        tensor.fill_(-5)
        paged.store(rig.worker, rig.joined, ids, lease.slots)
        rig.commit(lease)
        tensor.zero_()
        stage.copies_on()
        hit = rig.lookup(hashes)
        assert paged.load(rig.worker, rig.joined, ids, hit.slots(), hit.words()).all()
        assert (tensor == -5).all(), "another worker's bytes landed in this engine's blocks"
        hit.release()


def test_the_look_at_locks_sees_one() -> None:
    """The struct that asks for locks is the kernel's: with a lock of one's own on another description it sees it."""
    path = Path("/dev/shm") / f"gpu-locks-{os.getpid()}"
    path.write_bytes(bytes(HOLDERS_AT + HOLDERS_BYTES))
    try:
        with path.open("r+b") as holder, path.open("r+b") as looker:
            assert not is_locked(looker)
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, HOLDERS_AT + 64 * 7, 1, 0)
            fcntl.fcntl(holder, F_OFD_SETLK, lock)
            assert is_locked(looker)
    finally:
        path.unlink()
