"""The client against a real server: every verb, every refusal, and a server that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import kvmp
from kvmp.client import Answer, BlockLayout, Client, Namespace, ReadLease, WriteLease, limit_waits
from kvmp.errors import (
    BoundExceeded,
    Busy,
    ConnectError,
    InvalidInput,
    KvmpError,
    LeaseError,
    NamespaceError,
    NoServer,
    ServerLost,
)
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from kvmp.server import Server
from tests.stopping import stopped

BLOCK_TOKENS = 16
PART_BYTES = 4096
LAYOUT = '{"kind": "test"}'
WATCHDOG_S = 10.0  # for what becomes true soon, or never


def spec(model: str = "m", parts: int = 1, part_bytes: int = PART_BYTES) -> NamespaceSpec:
    part = PartSpec(bytes=(part_bytes,), layout={"kind": "test"})
    return NamespaceSpec(model=model, facts={}, groups=(GroupSpec(block_tokens=BLOCK_TOKENS),), parts=(part,) * parts)


def hash_list(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


@pytest.fixture
def server() -> Iterator[Server]:
    with kvmp.launch("64MiB") as server:
        yield server


@pytest.fixture
def scheduler(server: Server) -> Iterator[Client]:
    with Client.connect(server.endpoint) as client:
        yield client


@pytest.fixture
def ns(scheduler: Client) -> Namespace:
    return scheduler.open(spec())


def worker_of(scheduler: Client, part: int = 0) -> Client:
    return Client.connect(scheduler.endpoint, role="worker", engine_token=scheduler.engine_token, part=part)


@pytest.fixture
def worker(scheduler: Client) -> Iterator[Client]:
    with worker_of(scheduler) as client:
        yield client


def reserve(client: Client, ns: Namespace, hashes: NDArray[np.uint8], **where: object) -> WriteLease:
    """Reserves, again while the server is still backing its memory."""
    end = time.monotonic() + WATCHDOG_S
    while True:
        lease = client.reserve(ns, hashes, **({"first_block": 0} | where))
        if Answer.WARMING not in lease.answers:
            return lease
        assert time.monotonic() < end, "the server never backed enough memory"
        lease.cancel()


def layout_of(memory: NDArray[np.uint8]) -> BlockLayout:
    """Describes memory that the caller keeps for as long as the layout is used."""
    blocks, size = memory.shape
    return BlockLayout(np.array([[memory.ctypes.data, size, size, 0]], dtype=np.int64), blocks)


def store(scheduler: Client, worker: Client, ns: Namespace, hashes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stores blocks of random bytes and returns the bytes."""
    memory = np.random.default_rng(7).integers(0, 256, (len(hashes), PART_BYTES), dtype=np.uint8)
    lease = reserve(scheduler, ns, hashes)
    lease.handed_over()
    joined = worker.join(ns.id, ns.digest, LAYOUT)
    worker.store_blocks(layout_of(memory), joined, 0, np.arange(len(hashes)), lease.slots)
    assert worker.commit(lease.lease_id, lease.slots, lease.words) == len(hashes)
    return memory


def freeze(server: Server) -> None:
    """Returns once the server has stopped: the signal alone takes its time."""
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED)


def becomes_true(condition: object) -> bool:
    end = time.monotonic() + WATCHDOG_S
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
    return False


def test_a_session_has_an_identity(server: Server, scheduler: Client) -> None:
    assert scheduler.endpoint == server.endpoint
    assert scheduler.engine_token != 0
    assert scheduler.server_epoch != 0
    assert len(scheduler.segment_id) == 32
    assert not scheduler.lost
    assert scheduler.ping() > 0
    with Client.connect(server.endpoint) as other:
        assert other.engine_token != scheduler.engine_token
        assert other.segment_id == scheduler.segment_id


def test_namespaces_have_the_digest_that_the_spec_says(scheduler: Client, worker: Client) -> None:
    opened = scheduler.open(spec())
    assert opened.digest == spec().digest()
    assert scheduler.open(spec()).id == opened.id
    assert scheduler.open(spec("other")).id != opened.id
    joined = worker.join(opened.id, opened.digest, LAYOUT)
    assert (joined.id, joined.digest) == (opened.id, opened.digest)


def test_every_session_sees_the_namespaces_of_the_segment(server: Server, scheduler: Client) -> None:
    with Client.connect(server.endpoint, role="tool") as tool, Client.connect(server.endpoint) as other:
        assert tool.namespaces() == []
        opened = [scheduler.open(spec()), other.open(spec("other", parts=2))]
        listed = tool.namespaces()
        assert [(entry["id"], entry["digest"]) for entry in listed] == [(ns.id, ns.digest) for ns in opened]
        assert [entry["spec"] for entry in listed] == [json.loads(ns.spec_json()) for ns in opened]
        assert listed[1]["spec"]["model"] == "other"
        assert scheduler.namespaces() == other.namespaces() == listed
        server.kill()
        assert tool.namespaces() == listed, "it asks the segment, not the server"


def test_a_lookup_of_nothing_stored_misses(scheduler: Client, ns: Namespace) -> None:
    with scheduler.lookup(ns, hash_list(5)) as hit:
        assert (hit.tokens, hit.blocks(), hit.pinned) == (0, 0, False)
        assert hit.slots().dtype == np.uint32
        assert hit.words().dtype == np.uint64


def test_what_is_stored_is_found_and_loaded(scheduler: Client, worker: Client, ns: Namespace) -> None:
    hashes = hash_list(8)
    stored = store(scheduler, worker, ns, hashes)
    joined = worker.join(ns.id, ns.digest, LAYOUT)
    with scheduler.lookup(ns, np.concatenate([hashes, hash_list(2, seed=1)])) as hit:
        assert (hit.tokens, hit.blocks(), hit.first_block(), hit.pinned) == (8 * BLOCK_TOKENS, 8, 0, True)
        assert scheduler.stats()["pins"] > 0
        loaded = np.zeros_like(stored)
        ok = worker.load_blocks(layout_of(loaded), joined, 0, np.arange(8), hit.slots(), hit.words())
        assert ok.dtype == np.bool_
        assert ok.all()
        assert (loaded == stored).all()
        assert worker.check(hit.slots(), hit.words()).all()
        assert not worker.check(hit.slots(), hit.words() + np.uint64(1 << 16)).any()
    assert becomes_true(lambda: scheduler.stats()["pins"] == 0)


def test_a_load_from_an_evicted_slot_is_told(scheduler: Client, worker: Client, ns: Namespace) -> None:
    stored = store(scheduler, worker, ns, hash_list(4))
    joined = worker.join(ns.id, ns.digest, LAYOUT)
    hit = scheduler.lookup(ns, hash_list(4))
    slots, words = hit.slots(), hit.words()
    hit.release()
    assert becomes_true(lambda: scheduler.stats()["pins"] == 0)
    assert scheduler.clear() == 4
    loaded = np.zeros_like(stored)
    ok = worker.load_blocks(layout_of(loaded), joined, 0, np.arange(4), slots, words)
    assert not ok.any()


def test_pending_requests_are_polled(scheduler: Client, worker: Client, ns: Namespace) -> None:
    store(scheduler, worker, ns, hash_list(3))
    pending = scheduler.submit_lookup(ns, hash_list(3))
    found: list[ReadLease] = []
    assert becomes_true(lambda: found.append(lease) or True if (lease := pending.poll()) else False)
    assert found[0].blocks() == 3
    assert pending.poll() is None
    reserving = scheduler.submit_reserve(ns, hash_list(2, seed=5), first_block=0)
    granted: list[WriteLease] = []
    assert becomes_true(lambda: granted.append(lease) or True if (lease := reserving.poll()) else False)
    assert len(granted[0].answers) == 2


def test_a_young_lookup_is_given_a_moment(server: Server, scheduler: Client, worker: Client, ns: Namespace) -> None:
    """Out of the thread's budget, which it is charged to; an older one is not waited for."""
    store(scheduler, worker, ns, hash_list(3))
    asked = scheduler.submit_lookup(ns, hash_list(3))
    assert (hit := asked.poll(moment_us=5_000_000)) is not None
    assert hit.blocks() == 3
    limit_waits()
    with stopped(server.pid):
        asked = scheduler.submit_lookup(ns, hash_list(3))
        assert asked.poll(moment_us=30_000) is None
        assert (waited := limit_waits()) > 20_000  # Less what the lookup was older than the look.
        assert asked.poll(moment_us=30_000) is None
        assert limit_waits(20_000) < waited / 2
        asked = scheduler.submit_lookup(ns, hash_list(3))
        assert asked.poll(moment_us=60_000_000) is None  # Or this test takes a minute.
        assert limit_waits() >= 20_000
    assert becomes_true(lambda: asked.poll() is not None)


def test_what_is_abandoned_is_given_back(scheduler: Client, worker: Client, ns: Namespace) -> None:
    store(scheduler, worker, ns, hash_list(3))
    scheduler.submit_lookup(ns, hash_list(3)).abandon()
    scheduler.submit_reserve(ns, hash_list(3, seed=9), first_block=0).abandon()

    def is_settled() -> bool:
        stats = scheduler.stats()
        return stats["read_leases"] == stats["write_leases"] == stats["pins"] == 0 and scheduler.open_requests == 0

    assert becomes_true(is_settled)
    assert scheduler.stats()["blocks_writing"] == 0


def test_answers_say_why_nothing_was_granted(scheduler: Client, worker: Client, ns: Namespace) -> None:
    hashes = hash_list(4)
    store(scheduler, worker, ns, hashes[:2])
    with reserve(scheduler, ns, hashes) as first:
        assert list(first.answers) == [Answer.PRESENT, Answer.PRESENT, Answer.GRANTED, Answer.GRANTED]
        again = scheduler.reserve(ns, hashes[2:], first_block=2, parent=hashes[1].tobytes())
        assert list(again.answers) == [Answer.PENDING, Answer.PENDING]
        assert again.lease_id == 0
    orphan = scheduler.reserve(ns, hash_list(2, seed=3), first_block=5, parent=bytes(32))
    assert list(orphan.answers) == [Answer.NO_PARENT, Answer.NO_PARENT]


def test_a_cancelled_reserve_leaves_nothing(scheduler: Client, ns: Namespace) -> None:
    with reserve(scheduler, ns, hash_list(3)) as lease:
        assert lease.lease_id != 0
        assert scheduler.stats()["blocks_writing"] == 3
    assert becomes_true(lambda: scheduler.stats()["blocks_writing"] == 0)
    assert scheduler.stats()["write_leases"] == 0


def test_an_aborted_part_is_never_found(scheduler: Client, worker: Client, ns: Namespace) -> None:
    lease = reserve(scheduler, ns, hash_list(3))
    lease.handed_over()
    worker.join(ns.id, ns.digest, LAYOUT)
    assert worker.abort(lease.lease_id, lease.slots, lease.words) == 3
    assert scheduler.lookup(ns, hash_list(3)).tokens == 0
    assert scheduler.stats()["aborted_parts"] == 3


def test_a_block_is_found_only_when_every_part_is_committed(scheduler: Client) -> None:
    ns = scheduler.open(spec(parts=2))
    lease = reserve(scheduler, ns, hash_list(2))
    lease.handed_over()
    with worker_of(scheduler, 0) as first, worker_of(scheduler, 1) as second:
        first.join(ns.id, ns.digest, LAYOUT)
        second.join(ns.id, ns.digest, LAYOUT)
        assert first.commit(lease.lease_id, lease.slots, lease.words) == 2
        assert scheduler.lookup(ns, hash_list(2)).tokens == 0
        assert second.commit(lease.lease_id, lease.slots, lease.words) == 2
        assert scheduler.lookup(ns, hash_list(2)).tokens == 2 * BLOCK_TOKENS


def test_a_list_longer_than_a_request_is_looked_up_in_pieces() -> None:
    count = 16_384 + 100
    with kvmp.launch("256MiB") as large, Client.connect(large.endpoint) as scheduler, worker_of(scheduler) as worker:
        ns = scheduler.open(spec())
        assert becomes_true(lambda: not scheduler.stats()["warming"])
        hashes = hash_list(count)
        worker.join(ns.id, ns.digest, LAYOUT)
        first = scheduler.reserve(ns, hashes, first_block=0, timeout_ms=WATCHDOG_S * 1000)
        granted = first.answers == Answer.GRANTED
        assert granted.sum() == 16_384
        rest = scheduler.reserve(
            ns, hashes[16_384:], first_block=16_384, parent=hashes[16_383].tobytes(), timeout_ms=WATCHDOG_S * 1000
        )
        for lease, taken in ((first, granted), (rest, rest.answers == Answer.GRANTED)):
            lease.handed_over()
            committed = worker.commit(
                lease.lease_id, lease.slots[taken], lease.words[taken], timeout_ms=WATCHDOG_S * 1000
            )
            assert committed == taken.sum()
        with scheduler.lookup(ns, hashes, timeout_ms=WATCHDOG_S * 1000) as hit:
            assert hit.tokens == count * BLOCK_TOKENS
            assert (hit.slots() == np.concatenate([first.slots[granted], rest.slots])).all()
        assert becomes_true(lambda: scheduler.stats()["read_leases"] == 0)


BAD_CALLS = [
    (lambda c, ns: c.lookup(ns, np.zeros((3, 16), np.uint8)), r"hashes: .*\(n, 32\) and dtype uint8.*\[3, 16\]"),
    (lambda c, ns: c.lookup(ns, np.zeros((3, 32), np.int8)), r"hashes: .*dtype int8"),
    (lambda c, ns: c.lookup(ns, [b"x"]), r"hashes: .*got list"),
    (lambda c, ns: c.lookup(ns, np.zeros((0, 32), np.uint8)), r"hashes: the list is empty"),
    (lambda c, ns: c.lookup(ns, hash_list(1), timeout_ms=-1), r"timeout_ms: -1"),
    (lambda c, ns: c.lookup(ns, hash_list(1), timeout_ms=float("nan")), r"timeout_ms: NaN"),
    (lambda c, ns: c.reserve(ns, hash_list(1), first_block=3), r"parent: the hash before"),
    (lambda c, ns: c.reserve(ns, hash_list(1), first_block=0, parent=bytes(32)), r"parent: block 0 has none"),
    (lambda c, ns: c.reserve(ns, hash_list(1), first_block=1, parent=b"x"), r"parent: 32 bytes are needed, got 1"),
    (lambda c, ns: c.reserve(ns, hash_list(1), first_block=0, group=4), r"group: 4 is out of range"),
    (lambda c, ns: c.lookup(ns, hash_list(1)).slots(7), r"group: the hit has no group 7"),
    (lambda c, ns: c.commit(1, np.zeros(1, np.uint32), np.zeros(1, np.uint64)), r"part: this client has none"),
    (lambda c, ns: c.check(np.zeros(2, np.uint32), np.zeros(1, np.uint64)), r"words: 1 words for 2 slots"),
    (lambda c, ns: c.check(np.zeros(2, np.int64), np.zeros(2, np.uint64)), r"slots: .*uint32.*int64"),
]


@pytest.mark.parametrize(("call", "text"), BAD_CALLS)
def test_a_bad_argument_is_named(scheduler: Client, ns: Namespace, call: object, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        call(scheduler, ns)  # type: ignore[operator]
    assert not scheduler.lost
    assert scheduler.ping() > 0


BLOCK_IDS, SLOTS, WORDS = np.zeros(1, np.int64), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
MEMORY = np.zeros((1, PART_BYTES), np.uint8)
ONE_BLOCK = layout_of(MEMORY)
ENDPOINT = "unix:/nowhere/kvmp.sock"

# Argument, a value that its type cannot hold, and the call, which is refused before anything is asked of the server.
OUT_OF_RANGE = [
    ("engine_token", -1, lambda c, ns, x: Client.connect(ENDPOINT, role="worker", part=0, engine_token=x)),
    ("part", 70_000, lambda c, ns, x: Client.connect(ENDPOINT, role="worker", part=x, engine_token=1)),
    ("timeout_ms", -5, lambda c, ns, x: Client.connect(ENDPOINT, timeout_ms=x)),
    ("timeout_ms", 10**400, lambda c, ns, x: Client.connect(ENDPOINT, timeout_ms=x)),
    ("allow_uids", 2**32, lambda c, ns, x: Client.connect(ENDPOINT, allow_uids=[0, x])),
    ("timeout_ms", -5, lambda c, ns, x: c.ping(x)),
    ("timeout_ms", -5, lambda c, ns, x: c.open(spec(), x)),
    ("timeout_ms", -5, lambda c, ns, x: c.stats(x)),
    ("timeout_ms", -5, lambda c, ns, x: c.clear(x)),
    ("namespace_id", 65_536, lambda c, ns, x: c.join(x, ns.digest, LAYOUT)),
    ("timeout_ms", -5, lambda c, ns, x: c.join(0, ns.digest, LAYOUT, x)),
    ("timeout_ms", -5, lambda c, ns, x: c.lookup(ns, hash_list(1), x)),
    ("first_block", -1, lambda c, ns, x: c.submit_reserve(ns, hash_list(1), first_block=x)),
    ("group", -1, lambda c, ns, x: c.submit_reserve(ns, hash_list(1), first_block=0, group=x)),
    ("first_block", 2**200, lambda c, ns, x: c.reserve(ns, hash_list(1), first_block=x)),
    ("group", 65_536, lambda c, ns, x: c.reserve(ns, hash_list(1), first_block=0, group=x)),
    ("timeout_ms", -5, lambda c, ns, x: c.reserve(ns, hash_list(1), first_block=0, timeout_ms=x)),
    ("lease_id", 2**64, lambda c, ns, x: c.commit(x, SLOTS, WORDS)),
    ("timeout_ms", 10**400, lambda c, ns, x: c.commit(0, SLOTS, WORDS, None, x)),
    ("lease_id", -1, lambda c, ns, x: c.abort(x, SLOTS, WORDS)),
    ("timeout_ms", 10**400, lambda c, ns, x: c.abort(0, SLOTS, WORDS, x)),
    ("group", -1, lambda c, ns, x: c.store_blocks(ONE_BLOCK, ns, x, BLOCK_IDS, SLOTS)),
    ("threads", -1, lambda c, ns, x: c.store_blocks(ONE_BLOCK, ns, 0, BLOCK_IDS, SLOTS, x)),
    ("server_epoch", -1, lambda c, ns, x: c.store_blocks(ONE_BLOCK, ns, 0, BLOCK_IDS, SLOTS, None, x)),
    ("group", 70_000, lambda c, ns, x: c.load_blocks(ONE_BLOCK, ns, x, BLOCK_IDS, SLOTS, WORDS)),
    ("threads", 2**64, lambda c, ns, x: c.load_blocks(ONE_BLOCK, ns, 0, BLOCK_IDS, SLOTS, WORDS, x)),
    ("group", -1, lambda c, ns, x: ns.slot_bytes(x)),
    ("group", -1, lambda c, ns, x: c.lookup(ns, hash_list(1)).blocks(x)),
    ("group", -1, lambda c, ns, x: c.lookup(ns, hash_list(1)).slots(x)),
    ("group", -1, lambda c, ns, x: c.lookup(ns, hash_list(1)).words(x)),
    ("group", -1, lambda c, ns, x: c.lookup(ns, hash_list(1)).first_block(x)),
    ("num_blocks", -1, lambda c, ns, x: BlockLayout(np.zeros((0, 4), np.int64), x)),
    ("num_blocks", 2**32, lambda c, ns, x: BlockLayout(np.zeros((0, 4), np.int64), x)),
]


@pytest.mark.parametrize(("argument", "value", "call"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_named(
    scheduler: Client, ns: Namespace, argument: str, value: int, call: Callable[[Client, Namespace, int], object]
) -> None:
    with pytest.raises(InvalidInput, match=rf"^{argument}: {value}(\D|$).*(allowed|needed|from 0 on)"):
        call(scheduler, ns, value)


def test_a_number_of_another_type_is_still_a_type_error(scheduler: Client, ns: Namespace) -> None:
    with pytest.raises(TypeError, match="first_block"):
        scheduler.submit_reserve(ns, hash_list(1), first_block="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group"):
        scheduler.submit_reserve(ns, hash_list(1), first_block=0, group=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("endpoint", "options", "error", "text"),
    [
        ("http://x", {}, InvalidInput, "unix:PATH or tcp://HOST:PORT"),
        ("tcp://localhost", {}, InvalidInput, "port is missing"),
        ("unix:/nowhere/kvmp.sock", {}, NoServer, r"unix:/nowhere/kvmp.sock.*kvmp serve"),
        ("unix:/nowhere/kvmp.sock", {"role": "boss"}, InvalidInput, 'role: "boss"'),
        ("unix:/nowhere/kvmp.sock", {"role": "worker"}, InvalidInput, "engine_token"),
        ("unix:/nowhere/kvmp.sock", {"role": "worker", "engine_token": 1}, InvalidInput, "part"),
        ("unix:/nowhere/kvmp.sock", {"part": 1}, InvalidInput, "only workers"),
    ],
)
def test_a_connection_that_cannot_be_is_refused(
    endpoint: str, options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Client.connect(endpoint, **options)


def test_nobody_there_is_told_from_a_refusal(server: Server, tmp_path: Path) -> None:
    assert issubclass(NoServer, ConnectError)
    with pytest.raises(NoServer, match="refused"):
        Client.connect(f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectError) as refused:
        Client.connect(server.endpoint, role="worker", engine_token=12345, part=0)
    assert not isinstance(refused.value, NoServer)
    (tmp_path / "file").touch()
    with pytest.raises(ConnectError, match="cannot be reached") as unreachable:
        Client.connect(f"unix:{tmp_path}/file/kvmp.sock")
    assert not isinstance(unreachable.value, NoServer)
    server.kill()
    with pytest.raises(NoServer, match="kvmp serve"):
        Client.connect(server.endpoint)


def test_a_worker_of_no_engine_is_refused(server: Server) -> None:
    with pytest.raises(ConnectError, match=r"refused"):
        Client.connect(server.endpoint, role="worker", engine_token=12345, part=0)


def test_a_worker_with_another_layout_is_refused(scheduler: Client, worker: Client, ns: Namespace) -> None:
    with pytest.raises(NamespaceError):
        worker.join(ns.id, ns.digest, '{"kind": "other"}')
    with pytest.raises(NamespaceError):
        worker.join(ns.id, "0" * 64, LAYOUT)
    with pytest.raises(InvalidInput, match="layout_json"):
        worker.join(ns.id, ns.digest, "{")
    assert worker.join(ns.id, ns.digest, LAYOUT).id == ns.id


def test_a_spec_that_cannot_be_is_refused(scheduler: Client) -> None:
    with pytest.raises(NamespaceError, match="block_tokens"):
        scheduler.open(NamespaceSpec(model="m", facts={}, groups=(GroupSpec(block_tokens=0),), parts=spec().parts))
    with pytest.raises(NamespaceError, match="--chunk"):
        scheduler.open(spec("large", part_bytes=8 << 20))
    with pytest.raises(NamespaceError, match="parse"):
        scheduler.open("{}")
    assert scheduler.open(spec()).id >= 0


def test_a_namespace_of_another_session_is_refused(server: Server, ns: Namespace) -> None:
    with Client.connect(server.endpoint) as other, pytest.raises(NamespaceError, match="another session"):
        other.lookup(ns, hash_list(1))


def test_an_unknown_lease_commits_nothing(worker: Client, scheduler: Client, ns: Namespace) -> None:
    worker.join(ns.id, ns.digest, LAYOUT)
    try:
        taken = worker.commit(999, np.zeros(1, np.uint32), np.zeros(1, np.uint64))
    except LeaseError:
        taken = 0
    assert taken == 0


def test_a_copy_out_of_bounds_moves_nothing(scheduler: Client, worker: Client, ns: Namespace) -> None:
    stored = store(scheduler, worker, ns, hash_list(2))
    joined = worker.join(ns.id, ns.digest, LAYOUT)
    hit = scheduler.lookup(ns, hash_list(2))
    memory = np.zeros_like(stored)
    layout = layout_of(memory)
    with pytest.raises(InvalidInput, match=r"block_ids: 2 is out of range"):
        worker.load_blocks(layout, joined, 0, np.array([0, 2]), hit.slots(), hit.words())
    with pytest.raises(InvalidInput, match=r"block_ids: -1 is out of range"):
        worker.load_blocks(layout, joined, 0, np.array([0, -1]), hit.slots(), hit.words())
    with pytest.raises(InvalidInput, match=r"twice"):
        worker.load_blocks(layout, joined, 0, np.array([0, 0]), hit.slots(), hit.words())
    with pytest.raises(InvalidInput, match=r"slot 4294967295 is outside"):
        worker.load_blocks(layout, joined, 0, np.arange(2), np.full(2, 2**32 - 1, np.uint32), hit.words())
    with pytest.raises(InvalidInput, match=r"layout: its blocks have 2048 bytes"):
        worker.load_blocks(layout_of(memory.reshape(4, 2048)), joined, 0, np.arange(2), hit.slots(), hit.words())
    with pytest.raises(LeaseError, match=r"epoch"):
        worker.store_blocks(layout, joined, 0, np.arange(2), hit.slots(), server_epoch=1)
    assert not memory.any()


def test_a_killed_server_is_noticed_at_once(server: Server, scheduler: Client, ns: Namespace) -> None:
    pending = scheduler.submit_lookup(ns, hash_list(1))
    pending.abandon()
    server.kill()
    assert becomes_true(lambda: scheduler.lost)
    assert "closed the session" in (scheduler.lost_reason or "")
    before = scheduler.waited_us
    for call in (
        lambda: scheduler.lookup(ns, hash_list(1), timeout_ms=60_000),
        lambda: scheduler.submit_lookup(ns, hash_list(1)),
        lambda: scheduler.reserve(ns, hash_list(1), first_block=0, timeout_ms=60_000),
        lambda: scheduler.stats(),
        lambda: scheduler.ping(timeout_ms=60_000),
        lambda: scheduler.open(spec("later"), timeout_ms=60_000),
    ):
        with pytest.raises(ServerLost):
            call()
    assert scheduler.waited_us == before, "no call waits on a server that is gone"


def test_a_server_killed_under_a_waiting_call_ends_the_wait(server: Server, scheduler: Client, ns: Namespace) -> None:
    freeze(server)
    pending = scheduler.submit_lookup(ns, hash_list(1))
    assert pending.poll() is None
    server.kill()
    with pytest.raises(ServerLost):
        scheduler.lookup(ns, hash_list(1), timeout_ms=60_000)
    with pytest.raises(ServerLost):
        pending.poll()


def test_a_missed_bound_is_a_loss_until_a_ping_is_answered(
    server: Server, scheduler: Client, worker: Client, ns: Namespace
) -> None:
    store(scheduler, worker, ns, hash_list(2))
    freeze(server)
    try:
        with pytest.raises(BoundExceeded, match=r"lookup was not answered within 20 ms"):
            scheduler.lookup(ns, hash_list(2), timeout_ms=20)
        assert scheduler.lost
        before = scheduler.waited_us
        with pytest.raises(ServerLost, match=r"lookup was not answered within 20 ms"):
            scheduler.reserve(ns, hash_list(2), first_block=0, timeout_ms=60_000)
        with pytest.raises(ServerLost):
            scheduler.submit_lookup(ns, hash_list(2))
        assert scheduler.waited_us == before, "no call waits while the server is lost"
        for _ in range(3):
            with pytest.raises(BoundExceeded, match=r"ping"):
                scheduler.ping(timeout_ms=20)
        assert scheduler.open_requests == 2, "one lookup, and one ping however often it was asked"
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert scheduler.ping(timeout_ms=WATCHDOG_S * 1000) > 0
    assert not scheduler.lost
    assert becomes_true(lambda: scheduler.stats()["read_leases"] == 0), "the late hit was released"
    assert scheduler.lookup(ns, hash_list(2)).blocks() == 2


def test_late_grants_are_cancelled(server: Server, scheduler: Client, ns: Namespace) -> None:
    reserve(scheduler, ns, hash_list(1)).cancel()
    freeze(server)
    try:
        with pytest.raises(BoundExceeded):
            scheduler.reserve(ns, hash_list(4), first_block=0, timeout_ms=20)
    finally:
        server.process.send_signal(signal.SIGCONT)
    scheduler.ping(timeout_ms=WATCHDOG_S * 1000)
    assert becomes_true(lambda: scheduler.stats()["write_leases"] == 0)
    assert scheduler.stats()["granted"] >= 4, "the server did grant them"
    assert scheduler.stats()["blocks_writing"] == 0


def test_a_closed_client_says_so(scheduler: Client, ns: Namespace) -> None:
    hit = scheduler.lookup(ns, hash_list(1))
    scheduler.close()
    scheduler.close()
    hit.release()
    with pytest.raises(ServerLost, match="closed"):
        scheduler.lookup(ns, hash_list(1))


def test_a_forked_child_is_told_to_connect_anew(scheduler: Client, ns: Namespace) -> None:
    hit = scheduler.lookup(ns, hash_list(1))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            scheduler.ping()
            text = "no error"
        except KvmpError as error:
            text = str(error)
        hit.release()
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 4096).decode()
    os.close(reader)
    os.close(writer)
    assert "fork" in text
    assert "spawn" in text
    assert scheduler.ping() > 0, "the parent's session goes on"


def test_ctrl_c_ends_a_long_wait(server: Server, scheduler: Client) -> None:
    freeze(server)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                scheduler.ping(timeout_ms=100_000)
        finally:
            signal.signal(signal.SIGALRM, previous)
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_nothing_is_left_behind(server: Server) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    Client.connect(server.endpoint).close()
    before = held()
    for _ in range(5):
        with Client.connect(server.endpoint) as scheduler, worker_of(scheduler) as worker:
            ns = scheduler.open(spec())
            store(scheduler, worker, ns, hash_list(2))
            scheduler.clear()
        del scheduler, worker, ns
    assert held() == before


def arena_mappings(server: Server) -> set[str]:
    """Address ranges of this process that map chunks of the server's segment."""
    with open("/proc/self/maps") as maps:
        found = [line.split() for line in maps if str(server.segment_path) in line]
    return {words[0] for words in found if words[1].startswith("rw")}


def test_a_re_attach_keeps_the_mapping_of_the_same_segment(server: Server, scheduler: Client) -> None:
    with worker_of(scheduler) as first:
        mapped = arena_mappings(server)
        assert len(mapped) == 1
    options = {"role": "worker", "engine_token": scheduler.engine_token, "part": 1}
    with Client.connect(server.endpoint, **options, reuse=first) as second:
        assert arena_mappings(server) == mapped
        del first
        assert arena_mappings(server) == mapped
        with Client.connect(server.endpoint, **{**options, "part": 2}):
            assert len(arena_mappings(server)) == 2, "without it, another one is made"
        assert not second.lost


def test_too_many_questions_are_busy_and_nothing_is_lost(server: Server, scheduler: Client, ns: Namespace) -> None:
    freeze(server)
    try:
        pending = [scheduler.submit_lookup(ns, hash_list(1)) for _ in range(952)]
        with pytest.raises(Busy, match="ask again"):
            scheduler.submit_lookup(ns, hash_list(1))
        assert not scheduler.lost
        assert not issubclass(Busy, BoundExceeded)
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert scheduler.ping(timeout_ms=WATCHDOG_S * 1000) > 0
    assert len(pending) == 952
    assert scheduler.lookup(ns, hash_list(1)).tokens == 0, "answers that nobody has taken keep no room"


def test_a_sum_brings_the_length_of_the_part(server: Server, scheduler: Client) -> None:
    parts = (PartSpec(bytes=(PART_BYTES,), layout={"kind": "test"}), PartSpec(bytes=(512,), layout={"kind": "test"}))
    groups = (GroupSpec(block_tokens=BLOCK_TOKENS),)
    ns = scheduler.open(NamespaceSpec(model="m", facts={}, groups=groups, parts=parts))
    lease = reserve(scheduler, ns, hash_list(1))
    lease.handed_over()
    expected = {0: (0x1122334455667788, PART_BYTES), 1: (0x99AABBCCDDEEFF01, 512)}
    for part, (xxh3, _) in expected.items():
        with worker_of(scheduler, part) as worker:
            sums = np.array([xxh3], np.uint64)
            with pytest.raises(InvalidInput, match="join it first"):
                worker.commit(lease.lease_id, lease.slots, lease.words, sums)
            worker.join(ns.id, ns.digest, LAYOUT)
            assert worker.commit(lease.lease_id, lease.slots, lease.words, sums) == 1
    segment = server.segment_path.read_bytes()
    for xxh3, length in expected.values():
        assert xxh3.to_bytes(8, "little") + length.to_bytes(4, "little") in segment


def test_two_models_of_other_block_sizes_share_a_server(server: Server) -> None:
    memories = [np.random.default_rng(i).integers(0, 256, (16, PART_BYTES * (1 + 2 * i)), np.uint8) for i in range(2)]
    hashes = hash_list(16)  # the same for both: namespaces keep them apart
    with ExitStack() as stack:
        one, two = (stack.enter_context(Client.connect(server.endpoint)) for _ in range(2))
        worker_one, worker_two = (stack.enter_context(worker_of(scheduler)) for scheduler in (one, two))
        made = []
        for scheduler, worker, memory in zip((one, two), (worker_one, worker_two), memories, strict=True):
            ns = scheduler.open(spec(f"model-{memory.shape[1]}", part_bytes=memory.shape[1]))
            joined = worker.join(ns.id, ns.digest, LAYOUT)
            lease = reserve(scheduler, ns, hashes)
            lease.handed_over()
            worker.store_blocks(layout_of(memory), joined, 0, np.arange(16), lease.slots)
            assert worker.commit(lease.lease_id, lease.slots, lease.words) == 16
            made.append((scheduler, worker, ns, joined))
        for (scheduler, worker, ns, joined), memory in zip(made, memories, strict=True):
            loaded = np.zeros_like(memory)
            with scheduler.lookup(ns, hashes) as hit:
                slots, words = hit.slots(), hit.words()
                assert worker.load_blocks(layout_of(loaded), joined, 0, np.arange(16), slots, words).all()
            assert (loaded == memory).all()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_tcp_endpoint_leads_to_the_socket() -> None:
    port = free_port()
    place = f"127.0.0.1:{port}"
    with kvmp.launch("64MiB", tcp=place) as server, Client.connect(f"tcp://{place}") as client:
        assert client.endpoint == server.endpoint
        assert client.ping() > 0
        # In a container, say, that has not the server's folder: there is a server, and none must be started.
        with pytest.raises(ConnectError, match=r"socket_dir") as elsewhere:
            Client.connect(f"tcp://{place}", socket_dir="/not/here")
        assert not isinstance(elsewhere.value, NoServer)


def test_a_socket_is_found_in_the_folder_as_mapped_here(tmp_path: Path) -> None:
    with kvmp.launch("64MiB") as server:
        mapped = tmp_path / "mapped"
        mapped.symlink_to(server.socket_path.parent)
        elsewhere = f"unix:/not/here/{server.socket_path.name}"
        with pytest.raises(ConnectError):
            Client.connect(elsewhere)
        with Client.connect(elsewhere, socket_dir=mapped) as client:
            assert client.endpoint == f"unix:{mapped / server.socket_path.name}"
            assert client.ping() > 0


IMPOSTOR = """
import os, socket, sys
os.setgroups([]), os.setgid(65534), os.setuid(65534)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
listener.listen(1)
print("ready", flush=True)
listener.accept()[0].recv(1 << 16)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a server as another uid")
def test_a_server_of_another_uid_is_refused() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        path = f"{folder}/impostor.sock"
        command = [sys.executable, "-c", IMPOSTOR, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as impostor:
            try:
                assert impostor.stdout is not None
                assert impostor.stdout.readline() == b"ready\n"
                with pytest.raises(ConnectError, match=r"runs as uid 65534, this process as 0"):
                    Client.connect(f"unix:{path}")
            finally:
                impostor.kill()
