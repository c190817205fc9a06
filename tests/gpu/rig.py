"""A real server with one engine's scheduler and worker, and blocks of it to write and read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvmp
from kvmp.client import Client, Namespace, ReadLease, WriteLease
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from kvmp.paged import PagedKV
from kvmp.server import Server

WATCHDOG_S = 60.0


@dataclass
class Rig:
    """One engine's two clients, and the namespace of its KV."""

    server: Server
    scheduler: Client
    worker: Client
    namespace: Namespace
    joined: Namespace

    def reserve(self, count: int) -> tuple[NDArray[np.uint8], WriteLease]:
        """Hashes of new blocks and the slots to write them."""
        return reserved(self.scheduler, self.namespace, count)

    def commit(self, lease: WriteLease) -> None:
        taken = self.worker.commit(lease.lease_id, lease.slots, lease.words, timeout_ms=10_000)
        assert taken == len(lease.slots)

    def lookup(self, hashes: NDArray[np.uint8]) -> ReadLease:
        lease = self.scheduler.lookup(self.namespace, hashes, timeout_ms=10_000)
        assert len(lease.slots()) == len(hashes), "stored blocks are not found"
        return lease


def reserved(scheduler: Client, namespace: Namespace, count: int) -> tuple[NDArray[np.uint8], WriteLease]:
    """Hashes of new blocks and a lease, handed over, on the slots to write them."""
    hashes = np.frombuffer(secrets.token_bytes(32 * count), np.uint8).reshape(-1, 32)
    lease = scheduler.reserve(namespace, hashes, first_block=0, timeout_ms=10_000)
    lease.handed_over()
    assert not lease.answers.any(), "a grant was refused"
    return hashes, lease


def until(what: str, holds: Any) -> None:
    """Waits for what becomes true soon, or never."""
    deadline = time.monotonic() + WATCHDOG_S
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def registered_all(paged: PagedKV) -> bool:
    """Whether all of the arena is known to CUDA: from then on nothing goes by the driver's own staging."""
    done, of, failure = paged.lanes.registration()
    assert failure is None
    return done == of > 0


def spec_of(paged: PagedKV, model: str) -> NamespaceSpec:
    """A namespace whose one part is `paged`'s blocks."""
    part = PartSpec(bytes=(paged.block_bytes,), layout=paged.layout())
    return NamespaceSpec(model=model, facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,))


@contextmanager
def engine(server: Server, paged: PagedKV, model: str = "gpu", *, registered: bool = True) -> Iterator[Rig]:
    """An engine whose one part is `paged`'s blocks, once all of the arena is registered, or before any of it is asked
    to be."""
    with Client.connect(server.endpoint) as scheduler:
        namespace = scheduler.open(spec_of(paged, model))
        with Client.connect(
            server.endpoint, role="worker", engine_token=scheduler.engine_token, part=0, dma=paged.lanes is not None
        ) as worker:
            joined = worker.join(namespace.id, namespace.digest, json.dumps(paged.layout()))
            if registered:
                paged.prepare(worker)
                until("all of the arena is registered", lambda: registered_all(paged))
            yield Rig(server, scheduler, worker, namespace, joined)


@contextmanager
def served(size: str) -> Iterator[Server]:
    """A server all of whose memory is there."""
    with kvmp.launch(size) as server:
        with Client.connect(server.endpoint, role="tool") as tool:
            until("the server has its memory", lambda: not tool.stats()["warming"])
        yield server
