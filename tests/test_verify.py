"""Sums of parts: made by the writer, checked by the reader, and what they find leaves the cache."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import kvmp
from kvmp.client import Client, Namespace, ReadLease
from kvmp.errors import KvmpError
from kvmp.server import Server
from tests.test_client import BLOCK_TOKENS, LAYOUT, PART_BYTES, hash_list, layout_of, reserve, spec, worker_of

BLOCKS = 6
INTACT, GONE, DAMAGED = 0, 1, 2
PARTS = 2


class Stored:
    """A chain of blocks of two parts, whose writers sent sums unless told not to."""

    def __init__(self, server: Server, *, sums: bool = True):
        self.server = server
        self.scheduler = Client.connect(server.endpoint)
        self.workers = [worker_of(self.scheduler, part) for part in range(PARTS)]
        self.namespace = self.scheduler.open(spec(parts=PARTS))
        self.joined: list[Namespace] = [w.join(self.namespace.id, self.namespace.digest, LAYOUT) for w in self.workers]
        self.memory = np.random.default_rng(7).integers(0, 256, (BLOCKS, PART_BYTES), dtype=np.uint8)
        lease = reserve(self.scheduler, self.namespace, hash_list(BLOCKS))
        lease.handed_over()
        for worker, joined in zip(self.workers, self.joined, strict=True):
            worker.store_blocks(layout_of(self.memory), joined, 0, np.arange(BLOCKS), lease.slots)
            made = worker.part_sums(joined, 0, lease.slots) if sums else None
            assert worker.commit(lease.lease_id, lease.slots, lease.words, made) == BLOCKS

    def hit(self) -> ReadLease:
        return self.scheduler.lookup(self.namespace, hash_list(BLOCKS))

    def check(self, hit: ReadLease, part: int = 0) -> NDArray[np.uint8]:
        return self.workers[part].check_sums(self.joined[part], 0, hit.slots(), hit.words())

    def flip_a_bit(self, block: int, part: int) -> None:
        """Writes into the segment's file, as a stray store of any process would."""
        segment = np.memmap(self.server.segment_path, np.uint8, mode="r+")
        pages = segment.reshape(-1, PART_BYTES)
        found = np.flatnonzero((pages == self.memory[block]).all(axis=1))
        assert found.size == PARTS  # this block's parts, one behind the other
        pages[found[part], PART_BYTES // 3] ^= 1

    def close(self) -> None:
        for client in (*self.workers, self.scheduler):
            client.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with kvmp.launch("64MiB") as server:
        yield server


@pytest.fixture
def stored(server: Server) -> Iterator[Stored]:
    stored = Stored(server)
    yield stored
    stored.close()


def test_what_was_stored_is_intact(stored: Stored) -> None:
    hit = stored.hit()
    assert all((stored.check(hit, part) == INTACT).all() for part in range(PARTS))


def test_a_flipped_bit_is_seen_in_its_part_and_no_other(stored: Stored) -> None:
    stored.flip_a_bit(block=2, part=1)
    hit = stored.hit()
    assert (stored.check(hit, 0) == INTACT).all()
    assert stored.check(hit, 1).tolist() == [INTACT, INTACT, DAMAGED, INTACT, INTACT, INTACT]


def test_a_damaged_block_and_what_hangs_on_it_leave_the_cache(stored: Stored) -> None:
    stored.flip_a_bit(block=2, part=1)
    with stored.hit() as hit:
        damaged = stored.check(hit, 1) == DAMAGED
        assert stored.workers[1].distrust(hit.slots()[damaged], hit.words()[damaged]) == 1
        assert stored.check(hit, 1).tolist() == [INTACT, INTACT, GONE, GONE, GONE, GONE]
    assert stored.hit().tokens == 2 * BLOCK_TOKENS
    stats = stored.scheduler.stats()
    assert (stats["distrusted_blocks"], stats["blocks_ready"]) == (1, 2)


def test_a_stale_word_evicts_nothing(stored: Stored) -> None:
    hit = stored.hit()
    assert stored.workers[0].distrust(hit.slots(), hit.words() + np.uint64(1 << 16)) == 0
    assert stored.hit().tokens == BLOCKS * BLOCK_TOKENS


def test_only_a_worker_of_the_namespace_is_heard(stored: Stored) -> None:
    hit = stored.hit()
    with pytest.raises(KvmpError, match="part: this client has none"):
        stored.scheduler.distrust(hit.slots(), hit.words())
    stranger = Client.connect(stored.server.endpoint)
    with stranger, worker_of(stranger) as worker:
        other = stranger.open(spec("another model"))
        worker.join(other.id, other.digest, LAYOUT)
        assert worker.distrust(hit.slots(), hit.words()) == 0
    assert stored.hit().tokens == BLOCKS * BLOCK_TOKENS


def test_a_part_without_a_sum_counts_as_damaged(server: Server) -> None:
    stored = Stored(server, sums=False)
    assert (stored.check(stored.hit()) == DAMAGED).all()
    stored.close()


def test_sums_outlive_the_server(server: Server) -> None:
    first = Stored(server)
    first.close()
    server.kill()
    with kvmp.launch("64MiB", name=server.segment_path.stem, ephemeral=True) as second:
        scheduler = Client.connect(second.endpoint)
        with scheduler, worker_of(scheduler) as worker:
            namespace = scheduler.open(spec(parts=PARTS))
            joined = worker.join(namespace.id, namespace.digest, LAYOUT)
            hit = scheduler.lookup(namespace, hash_list(BLOCKS))
            assert hit.blocks() == BLOCKS
            assert (worker.check_sums(joined, 0, hit.slots(), hit.words()) == INTACT).all()
            hit.release()
