"""Copies of memory that CUDA refused to register: slower, and byte for byte the same; one warning says so.

CUDA registers no memory of which a part is registered already. So one page is, in a piece of the arena, before kvmp
comes to that piece: it is refused, and with it all that would have come behind it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmp.client import Client, Namespace  # noqa: E402
from kvmp.server import Server  # noqa: E402
from tests.gpu.rig import engine, reserved, served, spec_of, until  # noqa: E402
from tests.gpu.tensors import Twin, odd_bytes, outermost_blocks, outermost_layers  # noqa: E402

pytestmark = pytest.mark.gpu

PAGE = 4096
ARENA = 1 << 30
# PIECE of rust/kvmp-cuda/src/registration.rs: bytes registered in one call.
PIECE = 256 << 20
WAYS = ["batch", "single", "gather"]


@pytest.fixture
def server() -> Iterator[Server]:
    """One a test: of its arena there is one mapping here then, and its address is known."""
    with served(f"{ARENA >> 20}MiB") as server:
        yield server


class Places:
    """Where slots lie in the arena."""

    def __init__(self, server: Server, namespace: Namespace, slots: np.ndarray):
        with Client.connect(server.endpoint, role="tool") as tool:
            chunk_bytes = tool.stats()["chunk_bytes"]
        # A slot's number: the pages of the chunks before its own, and its index in that.
        chunk, index = np.divmod(slots.astype(np.int64), chunk_bytes // PAGE)
        self._bytes = namespace.slot_bytes()
        self._offsets = chunk * chunk_bytes + index * self._bytes

    def pieces(self) -> set[int]:
        """The pieces that any of the slots is in."""
        return set((self._offsets // PIECE).tolist())

    def share_before(self, piece: int) -> float:
        """The share of the slots that lie before a piece."""
        return float((self._offsets < piece * PIECE).mean())

    def page_beside(self, piece: int) -> int:
        """The offset of a page in a piece that no slot has."""
        first = self._offsets[:, None] // PAGE + np.arange(-(-self._bytes // PAGE))
        free = np.setdiff1d(np.arange(piece * PIECE // PAGE, (piece + 1) * PIECE // PAGE), first)
        assert free.size, f"slots fill all of piece {piece}"
        return int(free[0]) * PAGE


def mapping(server: Server) -> int:
    """Where this process has the server's arena."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access, *_ = line.split()
        start, end = (int(address, 16) for address in place.split("-"))
        if line.endswith(str(server.segment_path)) and access.startswith("rw") and end - start == ARENA:
            found.append(start)
    assert len(found) == 1, f"the arena is mapped {len(found)} times"
    return found[0]


@contextmanager
def registered_page(address: int) -> Iterator[None]:
    """One page that CUDA has registered, for whoever comes later to be refused."""
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(address, PAGE, 0)) == 0
    try:
        yield
    finally:
        assert int(cudart.cudaHostUnregister(address)) == 0


@pytest.mark.parametrize("make", [outermost_blocks, outermost_layers, odd_bytes], ids=lambda make: make.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_registered_copies_are_the_same(server: Server, way: str, make: Callable) -> None:
    if make is odd_bytes and way == "gather":
        pytest.skip("the kernel moves whole vectors only")
    twin = Twin(make(torch.bfloat16), way=way)
    with engine(server, twin.paged, f"none-{way}-{make.__name__}", registered=False) as rig:
        hashes, lease = rig.reserve(200)
        page = Places(server, rig.namespace, lease.slots).page_beside(0)
        with registered_page(mapping(server) + page):
            twin.paged.prepare(rig.worker)
            until("the first piece is refused", twin.paged.trouble)
            assert "registering the arena" in twin.paged.trouble()
            twin.check_round_trip(rig, hashes, lease)
            assert twin.paged.lanes.registration()[0] == 0


@pytest.mark.parametrize("way", WAYS)
def test_where_a_part_is_registered_one_copy_moves_both(server: Server, way: str) -> None:
    """Slots of 12 pages, which leave some of each chunk's free, in at least two pieces; the last of them is refused."""
    blocks = 6000
    twin = Twin(outermost_layers(torch.bfloat16, blocks, 192), way=way, blocks=blocks)
    with engine(server, twin.paged, f"some-{way}", registered=False) as rig:
        hashes, lease = rig.reserve(blocks)
        places = Places(server, rig.namespace, lease.slots)
        last = max(places.pieces())
        assert 0 < places.share_before(last) < 1
        with registered_page(mapping(server) + places.page_beside(last)):
            twin.paged.prepare(rig.worker)
            until("the last piece is refused", twin.paged.trouble)
            assert twin.paged.lanes.registration()[0] == last * PIECE
            twin.check_round_trip(rig, hashes, lease)
            assert twin.paged.lanes.registration()[0] == last * PIECE


@pytest.fixture
def vllm() -> None:
    """Imported before the test runs: something in it keeps the frames that it is imported from, and their tensors."""
    pytest.importorskip("vllm")
    import kvmp.vllm.copier  # noqa: F401


@pytest.mark.filterwarnings("ignore")  # vLLM's imports have their own
@pytest.mark.usefixtures("vllm")
def test_the_connectors_copy_thread_warns_once_and_copies(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    from kvmp.vllm.copier import Copier
    from kvmp.vllm.joined import Membership
    from kvmp.vllm.metadata import LoadJob, NamespaceRef, SessionRef, StoreJob
    from kvmp.vllm.stats import KvmpStats

    logger = logging.getLogger("kvmp.tests.gpu")

    def warnings() -> list[str]:
        of_kvmp = [record for record in caplog.records if record.name == logger.name]
        return [record.getMessage() for record in of_kvmp if record.levelno >= logging.WARNING]

    twin, ids = Twin(outermost_blocks(torch.bfloat16)), np.arange(100)
    stored = twin.rows(ids)
    with Client.connect(server.endpoint) as scheduler, ExitStack() as stack:
        namespace = scheduler.open(spec_of(twin.paged, "copier"))
        hashes, lease = reserved(scheduler, namespace, len(ids))
        page = Places(server, namespace, lease.slots).page_beside(0)

        def connect(endpoint: str, **options: Any) -> Client:
            client = Client.connect(endpoint, **options)
            stack.enter_context(registered_page(mapping(server) + page))
            return client

        membership = Membership(0, json.dumps(twin.paged.layout()), None, dma=True, connect=connect)
        copier = Copier(twin.paged, membership, logger, KvmpStats())
        stack.callback(copier.stop)
        session = SessionRef(scheduler.endpoint, scheduler.engine_token, scheduler.server_epoch, scheduler.segment_id)
        where = {"session": session, "namespace": NamespaceRef(namespace.id, namespace.digest)}
        copier.follow(session, where["namespace"])
        until("it says that copies are slower", warnings)
        copier.store(StoreJob(1, lease.lease_id, ids, lease.slots, lease.words, **where), twin.paged.record_event())
        until("the store has ended", lambda: copier.take_ended().stored == {1: len(ids)})
        hit = scheduler.lookup(namespace, hashes, timeout_ms=10_000)
        for tensor in twin.tensors.values():
            tensor.zero_()
        copier.load(LoadJob("load", ids + 150, hit.slots(), hit.words(), **where), twin.paged.record_event())
        until("the load has ended well", lambda: (ended := copier.take_ended()).loaded and not ended.failed)
        loaded = twin.rows(ids + 150)
        assert all(torch.equal(loaded[name], rows) for name, rows in stored.items())
        assert twin.paged.lanes.registration()[0] == 0
        (warning,) = warnings()
        assert "CUDA did not take all of the arena" in warning
        hit.release()
