"""What is played with the fake driver: ``python -m tests.fake_gpu.scenes SCENE LIBRARY``, one scene a process.

A scene that fails raises; one that hangs, say for the GIL, is ended by its caller.
"""

from __future__ import annotations

import gc
import json
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from kvmp import _kvmp
from kvmp.client import Answer, Client
from kvmp.errors import DeviceError
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from tests.fake_gpu.driver import Driver
from tests.serving import serve

WATCHDOG_S = 30.0
BLOCKS, RUN, RUNS = 40, 4096, 4
PART = RUN * RUNS


def until(what: str, holds: Callable[[], Any]) -> None:
    """Waits for what becomes true soon, or never."""
    deadline = time.monotonic() + WATCHDOG_S
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


class Memory:
    """Paged memory of a GPU that is the host's: `RUNS` runs a block, one behind the other's last block."""

    kept: ClassVar[list[Memory]] = []  # until the scene ends, as an engine keeps its own

    def __init__(self) -> None:
        self.kept.append(self)
        self.bytes = np.random.default_rng(secrets.randbits(64)).integers(0, 256, (RUNS, BLOCKS, RUN), np.uint8)

    def layout(self, device: int | None) -> _kvmp.BlockLayout:
        first = self.bytes.ctypes.data
        rows = [[first + at * BLOCKS * RUN, RUN, RUN, at * RUN] for at in range(RUNS)]
        return _kvmp.BlockLayout(np.array(rows, np.int64), BLOCKS, device)


@dataclass
class Rig:
    """One engine's two clients on a server of their own."""

    scheduler: Client
    worker: Client
    namespace: Any
    joined: Any

    def slots(self, count: int = 1) -> np.ndarray:
        """Slots to write; again while the server is still backing its memory."""
        hashes = np.frombuffer(secrets.token_bytes(32 * count), np.uint8).reshape(-1, 32)
        while True:
            lease = self.scheduler.reserve(self.namespace, hashes, first_block=0, timeout_ms=10_000)
            if (lease.answers == Answer.GRANTED).all():
                lease.handed_over()
                return lease.slots
            lease.cancel()

    def store(self, lanes: _kvmp.CudaLanes, block: int = 0, bell: _kvmp.Bell | None = None) -> _kvmp.Transfer:
        """A store of one block that was begun."""
        return lanes.store(self.worker, self.joined, 0, np.array([block]), self.slots(), bell=bell)


@contextmanager
def engine(size: str = "64MiB") -> Iterator[Rig]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmp-")))
        name = f"fake-gpu-{secrets.token_hex(4)}"
        # It ends with this process, however that does, and takes its segment along.
        server = stack.enter_context(serve(size, name=name, socket=folder / "kvmp.sock", flags=("--ephemeral",)))
        scheduler = stack.enter_context(Client.connect(server.endpoint))
        part = PartSpec(bytes=(PART,), layout={})
        spec = NamespaceSpec(model="fake", facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,))
        namespace = scheduler.open(spec)
        token = scheduler.engine_token
        worker = stack.enter_context(Client.connect(server.endpoint, role="worker", engine_token=token, part=0))
        yield Rig(scheduler, worker, namespace, worker.join(namespace.id, namespace.digest, json.dumps({})))


def is_registered(lanes: _kvmp.CudaLanes) -> bool:
    done, of, failure = lanes.registration()
    assert failure is None
    return done == of > 0


def registered(rig: Rig, lanes: _kvmp.CudaLanes) -> None:
    lanes.register(rig.worker)
    until("all of the arena is registered", lambda: is_registered(lanes))


def arenas_mapped() -> int:
    """Writable mappings of a segment in this process."""
    with open("/proc/self/maps") as lines:
        return sum(".kvmp" in line and " rw-s " in line for line in lines)


def beside(work: Callable[[], object]) -> threading.Thread:
    """Has it done by a thread of its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# Scenes.


def what_is_moved(driver: Driver) -> None:
    """Each way moves the bytes that the CPU's copies find, and back; nothing is left over."""
    for way in ("batch", "single", "gather"):
        memory, host = Memory(), Memory()
        lanes, bell = _kvmp.CudaLanes(memory.layout(0), way), _kvmp.Bell()
        assert lanes.way == way
        with engine() as rig:
            registered(rig, lanes)
            ids, slots = np.random.default_rng(1).permutation(BLOCKS)[:7], rig.slots(7)
            store = lanes.store(rig.worker, rig.joined, 0, ids, slots, bell=bell)
            assert bell.wait(WATCHDOG_S)
            assert store.has_ended()
            rig.worker.load_blocks(host.layout(None), rig.joined, 0, ids, slots, np.zeros(7, np.uint64))
            assert (host.bytes[:, ids] == memory.bytes[:, ids]).all()
            stored = memory.bytes.copy()
            memory.bytes[:] = 0
            lanes.load(rig.worker, rig.joined, 0, ids, slots).wait()
            assert (memory.bytes[:, ids] == stored[:, ids]).all()
            assert not np.delete(memory.bytes, ids, axis=1).any()
            del store
        del lanes
    gc.collect()
    assert (driver.registers, driver.allocations, driver.events) == (driver.unregisters, 0, 0)


def an_arena_that_is_let_go_of_is_unmapped(driver: Driver) -> None:
    """Its segment may be removed by now: nothing of it stays, once the last copy has ended."""
    lanes = _kvmp.CudaLanes(Memory().layout(0), "batch")
    with engine() as rig, engine() as other:
        registered(rig, lanes)
        lanes.unregister(other.worker)
        assert is_registered(lanes)
        driver.holds_ends = 1
        copy = rig.store(lanes)
        rig.worker.close()
        before = arenas_mapped()
        lanes.unregister(rig.worker)
        lanes.unregister(rig.worker)
        assert lanes.registration() == (0, 0, None)
        assert (driver.unregisters, arenas_mapped()) == (0, before)
        driver.end()
        assert copy.has_ended()
        rig.worker = rig.joined = None
        assert driver.unregisters == 0
    # The rig's context has closed its clients, and holds them no more.
    del copy, rig
    gc.collect()
    until("unregistered", lambda: driver.unregisters == driver.registers)
    assert driver.unregistering_thread not in (0, threading.get_native_id())
    until("unmapped", lambda: arenas_mapped() < before)


def another_arena_is_registered_at_once(driver: Driver) -> None:
    """The thread that begins copies does not wait for the arena before; of that no further piece is registered."""
    with engine("512MiB") as big, engine() as other:
        mapped_in = _kvmp.CudaLanes(Memory().layout(0), "batch")
        registered(big, mapped_in)
        pieces = driver.registers
        assert pieces >= 2
        del mapped_in
        assert driver.unregisters == pieces
        driver.holds_registering = 1
        lanes = _kvmp.CudaLanes(Memory().layout(0), "batch")
        lanes.register(big.worker)
        until("it is being registered", lambda: driver.registering > pieces)
        lanes.register(other.worker)
        driver.holds_registering = 0
        until("the other is registered", lambda lanes=lanes: is_registered(lanes))
        del lanes
        until("unregistered", lambda: driver.registers == driver.unregisters)
    assert driver.registered_mib == 512 + 256 + 64


def the_last_copy_of_an_arena_unregisters_elsewhere(driver: Driver) -> None:
    lanes = _kvmp.CudaLanes(Memory().layout(0), "batch")
    with engine() as rig, engine() as other:
        registered(rig, lanes)
        driver.holds_ends = 1
        copy = rig.store(lanes)
        lanes.register(other.worker)
        driver.end()
        driver.unregistering_thread = 0
        del copy
        until("unregistered", lambda: driver.unregistering_thread)
        assert driver.unregistering_thread != threading.get_native_id()
        driver.holds_ends = 0


def the_gil_is_free_while_the_driver_is_busy(driver: Driver) -> None:
    """Whoever looks after a copy beside a registration, which keeps the driver's lock, lets Python go on."""
    with engine() as rig, engine() as other:
        lanes = _kvmp.CudaLanes(Memory().layout(0), "batch")
        registered(rig, lanes)
        driver.holds_ends = 1
        copies = {0: rig.store(lanes), 1: rig.store(lanes, 1)}
        busy = _kvmp.CudaLanes(Memory().layout(0), "batch")
        driver.holds_registering, before = 1, driver.registering
        busy.register(other.worker)
        until("the driver is busy", lambda: driver.registering > before)
        asking = [beside(copies[0].has_ended), beside(copies[0].wait), beside(lambda: copies.pop(1))]
        until("all three wait for the driver", lambda: driver.waiting == 3)
        driver.holds_registering = 0
        driver.end()
        for thread in asking:
            thread.join(WATCHDOG_S)
            assert not thread.is_alive()
        driver.holds_ends = 0


def copies_that_have_ended_cost_no_call(driver: Driver) -> None:
    """The GPU tells of the end: looks, waits and drops need no driver, whose lock may be held for long."""
    lanes = _kvmp.CudaLanes(Memory().layout(0), "gather")
    with engine() as rig:
        registered(rig, lanes)
        driver.holds_ends = 1
        copies = [rig.store(lanes, block) for block in range(20)]
        allocations, events, asked = driver.allocations, driver.events, time.monotonic()
        looks = sum(not copy.has_ended() for _ in range(100) for copy in copies)
        assert looks == 2000
        assert driver.queries <= 1 + (time.monotonic() - asked) / 0.01, "asked for each look"
        driver.end()
        calls = driver.calls
        for copy in copies:
            assert copy.has_ended()
            copy.wait()
        del copy, copies
        assert driver.calls == calls
        # What they had serves the next ones.
        copies = [rig.store(lanes, block) for block in range(20)]
        driver.end()
        del copies
        assert (driver.allocations, driver.events) == (allocations, events)
        driver.holds_ends = 0


def a_failure_is_seen_by_every_copy(driver: Driver) -> None:
    lanes = _kvmp.CudaLanes(Memory().layout(0), "batch")
    with engine() as rig:
        registered(rig, lanes)
        driver.holds_ends = 1
        copies = [rig.store(lanes, block) for block in range(10)]
        driver.fails = 1
        driver.end()
        until("a failure", lambda first=copies[0]: raises(first.has_ended))
        assert all(raises(copy.has_ended) and raises(copy.wait) for copy in copies)
        del copies
        driver.fails = driver.holds_ends = 0


def raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except DeviceError as error:
        return "CUDA_ERROR_FAKE" in str(error)
    return False


def an_old_driver_has_no_batches(driver: Driver) -> None:
    """It says so at once, not in the first copy; left to itself kvmp takes what there is."""
    layout = Memory().layout(0)
    with pytest.raises(DeviceError, match=r"12\.8"):
        _kvmp.CudaLanes(layout, "batch")
    odd = np.zeros((4, 1001), np.uint8)
    odd_layout = _kvmp.BlockLayout(np.array([[odd.ctypes.data, 1001, 1001, 0]]), 4, 0)
    assert _kvmp.CudaLanes(odd_layout).way == "single"
    with pytest.raises(DeviceError, match="vectors of 16 bytes"):
        _kvmp.CudaLanes(odd_layout, "gather")
    assert driver.allocations == 0


def what_a_description_of_tensors_makes_of_it(driver: Driver) -> None:
    """`PagedKV`, of tensors that it takes for a GPU's."""
    import torch

    from kvmp import paged

    paged._device = lambda tensors: torch.device("cuda", 0)
    tensor = torch.arange(4 * PART, dtype=torch.uint8).reshape(4, PART)
    assert paged.PagedKV({"layer": tensor}).lanes.way == "gather"
    for way in ("batch", "single", "gather"):
        cache = paged.PagedKV({"layer": tensor}, way=way, width=2)
        assert (cache.lanes.way, cache.block_layout.device) == (way, 0)
        with engine() as rig:
            cache.prepare(rig.worker)
            until("all of the arena is registered", lambda cache=cache: is_registered(cache.lanes))
            slots, expected = rig.slots(), tensor[1].clone()
            cache.begin_store(rig.worker, rig.joined, [1], slots).wait()
            tensor[1] = 0
            load = cache.begin_load(rig.worker, rig.joined, [1], slots, np.zeros(1, np.uint64))
            assert load.good().tolist() == [False]  # of no lease
            assert torch.equal(tensor[1], expected)
            del load
            rig.worker.close()
            cache.forget(rig.worker)
            assert cache.lanes.registration() == (0, 0, None)
            until("unregistered", lambda: driver.unregisters == driver.registers)


def main() -> None:
    scene, library = sys.argv[1:]
    globals()[scene](Driver(library))


if __name__ == "__main__":
    main()
