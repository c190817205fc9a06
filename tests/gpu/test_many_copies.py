"""More at once than the gather kernel has tables for: many pairs in one copy, many copies in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmp.client import ReadLease  # noqa: E402
from kvmp.server import Server  # noqa: E402
from tests.gpu.rig import Rig, engine, served  # noqa: E402
from tests.gpu.tensors import Twin, outermost_blocks, outermost_layers  # noqa: E402

pytestmark = pytest.mark.gpu

# TABLE_PAIRS and TABLES of rust/kvmp-cuda/src/gather.rs: a table's room, and the tables that there are at the start.
TABLE_PAIRS, TABLES = 4096, 4
PAIRS = TABLE_PAIRS + 904
# PIECE of rust/kvmp-cuda/src/registration.rs: bytes registered in one call.
PIECE = 256 << 20
COPIES, EACH = 2 * TABLES, 15


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("1GiB") as server:
        yield server


@pytest.mark.parametrize("make", [outermost_blocks, outermost_layers], ids=lambda make: make.__name__)
@pytest.mark.parametrize("way", ["batch", "single", "gather"])
def test_more_pairs_in_one_copy_than_a_table_has_room_for(server: Server, way: str, make: Callable) -> None:
    """And more bytes than are registered in one piece: the slots lie in several."""
    twin = Twin(make(torch.bfloat16, PAIRS, 256), way=way, blocks=PAIRS)
    assert PAIRS * twin.paged.block_bytes > PIECE
    with engine(server, twin.paged, f"pairs-{way}-{make.__name__}") as rig:
        twin.check_round_trip(rig, *rig.reserve(PAIRS))


@dataclass
class Round:
    """Stores of the first blocks into slots of their own, and loads of as many that were kept into the blocks behind
    them, all in flight together."""

    rig: Rig
    twin: Twin
    kept: list[ReadLease]

    def __post_init__(self) -> None:
        self.reserved = [self.rig.reserve(EACH) for _ in range(COPIES)]
        self.stores: list[Any] = []
        self.loads: list[Any] = []

    def begin(self, after: Any) -> None:
        """Behind an event: stores and loads in turn, `COPIES` of each."""
        where, event = (self.rig.worker, self.rig.joined), after.cuda_event
        for at, ((_, lease), hit) in enumerate(zip(self.reserved, self.kept, strict=True)):
            self.stores.append(self.twin.paged.begin_store(*where, stored(at), lease.slots, after=event))
            self.loads.append(self.twin.paged.begin_load(*where, loaded(at), hit.slots(), hit.words(), after=event))

    def has_ended(self) -> list[bool]:
        return [copy.has_ended() for copy in self.stores + self.loads]

    def check(self) -> None:
        """Byte for byte, once all have ended: what each store wrote, and what each load brought."""
        for copy in self.stores:
            copy.wait()
        assert all(load.good().all() for load in self.loads)
        for at, (hashes, lease) in enumerate(self.reserved):
            self.rig.commit(lease)
            with self.rig.lookup(hashes) as hit:
                self.twin.check_slots(self.rig, stored(at), hit)
            self.twin.check_slots(self.rig, loaded(at), self.kept[at])


def stored(at: int) -> np.ndarray:
    """The blocks of a round's store."""
    return np.arange(EACH) + at * EACH


def loaded(at: int) -> np.ndarray:
    """The blocks that a round's load fills."""
    return stored(at) + COPIES * EACH


def test_more_copies_of_the_kernel_in_flight_than_there_are_tables(server: Server) -> None:
    """First with nothing before them, so that the kernel and its tables are there; then all held behind one event."""
    twin, kept = Twin(outermost_layers(torch.bfloat16), way="gather"), []
    with engine(server, twin.paged, "in-flight") as rig:
        for at in range(COPIES):
            hashes, lease = rig.reserve(EACH)
            twin.paged.store(rig.worker, rig.joined, loaded(at), lease.slots)
            rig.commit(lease)
            kept.append(rig.lookup(hashes))
        originals = twin.rows(np.arange(2 * COPIES * EACH))
        for hold in (False, True):
            turn = Round(rig, twin, kept)
            for tensor in twin.tensors.values():
                tensor[COPIES * EACH : 2 * COPIES * EACH].zero_()
            torch.cuda.synchronize()
            if hold:
                torch.cuda._sleep(2_000_000_000)
            gate = torch.cuda.current_stream().record_event()
            turn.begin(gate)
            assert len(turn.stores + turn.loads) > TABLES
            if hold:
                assert not any(turn.has_ended())
                assert not gate.query(), "not all were in flight at once"
            turn.check()
            now = twin.rows(np.arange(2 * COPIES * EACH))
            assert all(torch.equal(now[name], rows) for name, rows in originals.items())
        for hit in kept:
            hit.release()
