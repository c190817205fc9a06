"""The core's classes from Python: ring, block index, policies."""

import os
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmp.client import Answer
from kvmp.core import BlockIndex, Policy, Ring, policies
from kvmp.errors import InvalidInput, KvmpError, NamespaceError, ProtocolError, SegmentError
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec

ARENA = 4 << 20
SLOT = 64 << 10
SLOTS = ARENA // SLOT


def spec(model: str = "m") -> NamespaceSpec:
    part = PartSpec(bytes=(SLOT,), layout={})
    return NamespaceSpec(model=model, facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,))


def hash_list(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def entry(number: int) -> bytes:
    return number.to_bytes(8, "little") * 8


def test_entries_pass_between_two_processes_in_order() -> None:
    client = Ring()
    child = os.fork()
    if child == 0:
        server = Ring(client.fileno(), side="server")
        for _ in range(3 * 500):
            while (taken := server.pop()) is None:
                pass
            while not server.push(bytes(255 - byte for byte in taken)):
                pass
        os._exit(0)
    for first in range(0, 1500, 500):
        assert all(client.push(entry(first + i)) for i in range(500))
        for i in range(500):
            while (answer := client.pop()) is None:
                pass
            assert answer == bytes(255 - byte for byte in entry(first + i))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_full_ring_says_so() -> None:
    client = Ring()
    assert all(client.push(entry(i)) for i in range(client.capacity))
    assert not client.push(entry(0))
    server = Ring(client.fileno(), side="server")
    assert server.pop() == entry(0)
    assert client.push(entry(1))


def test_a_ring_refuses_what_it_cannot_take() -> None:
    ring = Ring()
    with pytest.raises(InvalidInput, match=r"entry: 64 bytes are needed, got 3"):
        ring.push(b"abc")
    with pytest.raises(InvalidInput, match=r"beyond"):
        ring.write_scratch(ring.scratch_bytes - 1, b"ab")
    with pytest.raises(InvalidInput, match=r"side"):
        Ring(side="both")
    with pytest.raises(SegmentError):
        Ring(-1)
    ring.write_scratch(64, b"hello")
    assert ring.read_scratch(64, 5) == b"hello"


def test_a_position_that_lies_is_a_protocol_error() -> None:
    ring = Ring()
    os.pwrite(ring.fileno(), (5000).to_bytes(8, "little"), 128)  # the completions' tail
    with pytest.raises(ProtocolError, match="5000"):
        ring.pop()


@pytest.fixture
def index() -> BlockIndex:
    index = BlockIndex(ARENA)
    index.add_namespace(0, spec())
    return index


def store(index: BlockIndex, hashes: NDArray[np.uint8], now_s: float = 0.0) -> int:
    grant = index.reserve(0, hashes, now_s=now_s)
    granted = grant.answers == Answer.GRANTED
    committed, ready = index.commit(grant.lease_id, grant.slots[granted], grant.words[granted])
    assert committed == ready == granted.sum()
    index.validate()
    return int(committed)


def test_an_index_finds_what_was_committed(index: BlockIndex) -> None:
    hashes = hash_list(5)
    assert store(index, hashes) == 5
    hit = index.lookup(0, np.concatenate([hashes, hash_list(1, seed=1)]))
    assert (hit.tokens, hit.first_blocks, len(hit.slots[0]), len(hit.words[0])) == (80, [0], 5, 5)
    assert index.clear() == 0, "the hit is pinned"
    assert index.release(hit.lease_id)
    assert not index.release(hit.lease_id)
    assert index.clear() == 5
    index.validate()


def test_an_index_evicts_the_coldest(index: BlockIndex) -> None:
    for number in range(SLOTS):
        store(index, hash_list(1, seed=number), now_s=number)
    index.release(index.lookup(0, hash_list(1, seed=0), now_s=SLOTS).lease_id)
    store(index, hash_list(1, seed=SLOTS), now_s=SLOTS + 1)
    assert index.stats()["evictions"] == 1
    assert index.lookup(0, hash_list(1, seed=0), now_s=SLOTS + 2).tokens == 16, "it was hit last"
    assert index.lookup(0, hash_list(1, seed=1), now_s=SLOTS + 2).tokens == 0, "it was the coldest"


def test_an_index_ends_leases(index: BlockIndex) -> None:
    grant = index.reserve(0, hash_list(3))
    assert list(index.reserve(0, hash_list(3)).answers) == [Answer.PENDING] * 3
    assert index.abort(grant.lease_id, grant.slots[:1], grant.words[:1]) == 1
    assert index.cancel(grant.lease_id)
    store(index, hash_list(2, seed=4), now_s=1.0)
    assert index.lookup(0, hash_list(2, seed=4), now_s=1.0).lease_id != 0
    assert index.expire(30.0) == 0
    assert index.expire(62.0) == 1
    index.validate()


def test_an_index_names_what_is_wrong(index: BlockIndex) -> None:
    with pytest.raises(NamespaceError, match="no namespace 7"):
        index.lookup(7, hash_list(1))
    with pytest.raises(NamespaceError, match="already there"):
        index.add_namespace(0, spec("other"))
    with pytest.raises(InvalidInput, match="policy"):
        BlockIndex(ARENA, policy="lur")
    with pytest.raises(InvalidInput, match="arena_bytes"):
        BlockIndex(100)
    with pytest.raises(InvalidInput, match="hashes"):
        index.lookup(0, np.zeros(3, np.uint8))


HASHES, NO_SLOTS, NO_WORDS = hash_list(1), np.zeros(0, np.uint32), np.zeros(0, np.uint64)

OUT_OF_RANGE = [
    ("fd", 2**31, lambda i, p, x: Ring(x)),
    ("offset", -1, lambda i, p, x: Ring().write_scratch(x, b"")),
    ("offset", 2**32, lambda i, p, x: Ring().read_scratch(x, 1)),
    ("length", -1, lambda i, p, x: Ring().read_scratch(0, x)),
    ("arena_bytes", -1, lambda i, p, x: BlockIndex(x)),
    ("chunk_bytes", -1, lambda i, p, x: BlockIndex(ARENA, chunk_bytes=x)),
    ("read_ttl_s", 10**400, lambda i, p, x: BlockIndex(ARENA, read_ttl_s=x)),
    ("namespace_id", -1, lambda i, p, x: i.add_namespace(x, spec())),
    ("namespace_id", 70_000, lambda i, p, x: i.lookup(x, HASHES)),
    ("now_s", 10**400, lambda i, p, x: i.lookup(1, HASHES, now_s=x)),
    ("engine", 2**64, lambda i, p, x: i.lookup(1, HASHES, engine=x)),
    ("namespace_id", -1, lambda i, p, x: i.reserve(x, HASHES)),
    ("first_block", -1, lambda i, p, x: i.reserve(1, HASHES, first_block=x)),
    ("group", 65_536, lambda i, p, x: i.reserve(1, HASHES, group=x)),
    ("now_s", -1, lambda i, p, x: i.reserve(1, HASHES, now_s=x)),
    ("engine", -1, lambda i, p, x: i.reserve(1, HASHES, engine=x)),
    ("lease_id", -1, lambda i, p, x: i.commit(x, NO_SLOTS, NO_WORDS)),
    ("part", 70_000, lambda i, p, x: i.commit(1, NO_SLOTS, NO_WORDS, part=x)),
    ("engine", -1, lambda i, p, x: i.commit(1, NO_SLOTS, NO_WORDS, engine=x)),
    ("lease_id", -1, lambda i, p, x: i.abort(x, NO_SLOTS, NO_WORDS)),
    ("part", -1, lambda i, p, x: i.abort(1, NO_SLOTS, NO_WORDS, part=x)),
    ("engine", -1, lambda i, p, x: i.abort(1, NO_SLOTS, NO_WORDS, engine=x)),
    ("lease_id", -1, lambda i, p, x: i.cancel(x)),
    ("engine", -1, lambda i, p, x: i.cancel(1, engine=x)),
    ("lease_id", 2**64, lambda i, p, x: i.release(x)),
    ("engine", -1, lambda i, p, x: i.release(1, engine=x)),
    ("now_s", 10**400, lambda i, p, x: i.expire(x)),
    ("arena_bytes", 2**64, lambda i, p, x: Policy("lru", x)),
    ("chunk_bytes", -1, lambda i, p, x: Policy("lru", ARENA, x)),
    ("chunk", -1, lambda i, p, x: p.add_chunk(x, 1)),
    ("slots", -1, lambda i, p, x: p.add_chunk(0, x)),
    ("chunk", 2**32, lambda i, p, x: p.remove_chunk(x)),
    ("slot", -1, lambda i, p, x: p.insert(x, 0.0)),
    ("now_s", 10**400, lambda i, p, x: p.insert(0, x)),
    ("slot", -1, lambda i, p, x: p.touch(x, 0.0)),
    ("now_s", 10**400, lambda i, p, x: p.touch(0, x)),
    ("slot", -1, lambda i, p, x: p.set_evictable(x)),
    ("slot", -1, lambda i, p, x: p.remove(x)),
    ("heir", -1, lambda i, p, x: p.remove(0, x)),
    ("now_s", 10**400, lambda i, p, x: p.admits(x)),
]


@pytest.mark.parametrize(("argument", "value", "call"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_named(
    index: BlockIndex, argument: str, value: int, call: Callable[[BlockIndex, Policy, int], object]
) -> None:
    with pytest.raises(InvalidInput, match=rf"^{argument}: {value}(\D|$).*(allowed|needed|from 0 on)"):
        call(index, Policy("lru", ARENA), value)


@pytest.mark.parametrize("name", policies())
def test_a_policy_gives_up_only_what_may_go(name: str) -> None:
    policy = Policy(name, ARENA)
    policy.add_chunk(0, 4)
    for slot in range(4):
        policy.insert(slot, now_s=slot)
    assert policy.coldest() is None
    for slot in (1, 2, 3):
        policy.set_evictable(slot)
    policy.validate()
    victim = policy.coldest()
    assert victim is not None
    assert victim[0] in (1, 2, 3)
    policy.remove(victim[0])
    policy.validate()


def test_the_policys_caller_is_held_to_its_duties() -> None:
    policy = Policy("lru", ARENA)
    policy.add_chunk(0, 2)
    policy.insert(0, now_s=5)
    for call, text in (
        (lambda: policy.insert(0, now_s=5), "tracked already"),
        (lambda: policy.insert(2, now_s=5), "in no chunk"),
        (lambda: policy.touch(1, now_s=5), "not tracked"),
        (lambda: policy.touch(0, now_s=4), "never goes back"),
        (lambda: policy.remove_chunk(0), "tracked slots"),
        (lambda: policy.add_chunk(0, 2), "there already"),
        (lambda: Policy("nope", ARENA), "no eviction policy"),
    ):
        with pytest.raises(InvalidInput, match=text):
            call()
    assert issubclass(InvalidInput, KvmpError)
