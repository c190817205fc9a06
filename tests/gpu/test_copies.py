"""Copies between a GPU and the arena, byte for byte, held against what the CPU path finds in the same slots.

All of the arena is registered before the first copy, so that each goes the way that its test names;
test_unregistered.py has those of memory that CUDA does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmp import _kvmp  # noqa: E402
from kvmp.errors import InvalidInput  # noqa: E402
from kvmp.paged import PagedKV  # noqa: E402
from kvmp.server import Server  # noqa: E402
from tests.gpu.rig import engine, served  # noqa: E402
from tests.gpu.tensors import (  # noqa: E402
    BLOCKS,
    Twin,
    bits,
    heads_outermost,
    kernel_blocks,
    noise,
    odd_bytes,
    on_cpu,
    outermost_blocks,
    outermost_layers,
)

pytestmark = pytest.mark.gpu

WAYS = ["batch", "single", "gather"]
LAYOUTS = [outermost_blocks, outermost_layers, kernel_blocks, heads_outermost, odd_bytes]
DTYPES = [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("1GiB") as server:
        yield server


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_stored_is_what_the_cpu_finds_and_what_is_loaded(
    server: Server, way: str, make: Callable, dtype: torch.dtype
) -> None:
    if make is odd_bytes and way == "gather":
        pytest.skip("the kernel moves whole vectors only; test_a_layout_picks_its_way has what is used instead")
    twin, rng = Twin(make(dtype), way=way), np.random.default_rng(1)
    with engine(server, twin.paged, f"{way}-{make.__name__}-{dtype}") as rig:
        for count in (1, 3, BLOCKS - 43):
            source, target = rng.permutation(BLOCKS)[:count], rng.permutation(BLOCKS)[:count]
            hashes, lease = rig.reserve(count)
            twin.paged.store(rig.worker, rig.joined, source, lease.slots)
            rig.commit(lease)
            hit = rig.lookup(hashes)
            twin.check_slots(rig, source, hit)
            expected = {name: bits(tensor).clone() for name, tensor in twin.tensors.items()}
            for name, rows in twin.rows(source).items():
                expected[name].unflatten(0, (BLOCKS, -1))[torch.from_numpy(target)] = rows
            assert twin.paged.load(rig.worker, rig.joined, target, hit.slots(), hit.words()).all()
            for name, tensor in twin.tensors.items():
                assert torch.equal(bits(tensor), expected[name]), f"{name}: other bytes than those named have changed"
            hit.release()


def test_a_layout_picks_its_way(server: Server) -> None:
    long_runs = {"layer": noise(8, 1 << 20, dtype=torch.uint8)}
    assert PagedKV(long_runs).lanes.way == "batch"
    assert PagedKV(outermost_layers(torch.bfloat16)).lanes.way == "gather"
    assert PagedKV(odd_bytes(torch.uint8)).lanes.way == "batch"


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_behind_the_work_that_was_given_to_the_gpu_before(server: Server, way: str) -> None:
    twin, ids = Twin(outermost_blocks(torch.bfloat16), way=way), np.arange(64)
    paged, tensors = twin.paged, twin.tensors
    with engine(server, paged, f"order-{way}") as rig:
        hashes, lease = rig.reserve(64)
        torch.cuda._sleep(200_000_000)
        for tensor in tensors.values():
            tensor.fill_(1.5)
        paged.store(rig.worker, rig.joined, ids, lease.slots)
        rig.commit(lease)
        hit = rig.lookup(hashes)
        torch.cuda._sleep(200_000_000)
        for tensor in tensors.values():
            tensor.fill_(-7.0)
        assert paged.load(rig.worker, rig.joined, ids, hit.slots(), hit.words()).all()
        for tensor in tensors.values():
            assert (tensor[:64] == 1.5).all()
            assert (tensor[64:] == -7.0).all()


def test_a_submitted_copy_leaves_the_engines_stream_and_thread_alone(server: Server) -> None:
    """The copy is behind an event that comes late: submitting it returns at once, and other streams go on."""
    twin, bell, ids = Twin(outermost_blocks(torch.bfloat16)), _kvmp.Bell(), np.arange(256)
    with engine(server, twin.paged, "aside") as rig:
        hashes, lease = rig.reserve(256)
        other_work = lambda: torch.zeros(1 << 20, device="cuda").sum().item()  # noqa: E731
        other_work()  # its kernels are loaded when they are first used, which waits for the whole GPU
        engine_stream = torch.cuda.Stream()
        with torch.cuda.stream(engine_stream):
            torch.cuda._sleep(2_000_000_000)
            late = engine_stream.record_event()
        copy = twin.paged.begin_store(
            rig.worker,
            rig.joined,
            ids,
            lease.slots,
            after=late.cuda_event,
            bell=bell,
            server_epoch=rig.worker.server_epoch,
        )
        assert not copy.has_ended()
        other_work()
        assert not copy.has_ended()
        assert bell.wait(60.0)
        copy.wait()
        assert late.query()
        rig.commit(lease)
        twin.check_slots(rig, ids, rig.lookup(hashes))


def test_a_load_and_a_store_at_once(server: Server) -> None:
    tensors = outermost_layers(torch.bfloat16)
    paged = PagedKV(tensors)
    with engine(server, paged, "both") as rig:
        half = BLOCKS // 2
        hashes, lease = rig.reserve(half)
        paged.store(rig.worker, rig.joined, np.arange(half), lease.slots)
        rig.commit(lease)
        first = {name: bits(tensor[:half]).clone() for name, tensor in tensors.items()}
        second = {name: bits(tensor[half:]).clone() for name, tensor in tensors.items()}
        for _ in range(50):
            hit = rig.lookup(hashes)
            others, fresh = rig.reserve(half)
            load = paged.begin_load(rig.worker, rig.joined, np.arange(half), hit.slots(), hit.words())
            store = paged.begin_store(rig.worker, rig.joined, np.arange(half, BLOCKS), fresh.slots)
            assert load.good().all()
            store.wait()
            rig.commit(fresh)
            hit.release()
            again = rig.lookup(others)
            assert paged.load(rig.worker, rig.joined, np.arange(half), again.slots(), again.words()).all()
            for name, tensor in tensors.items():
                assert torch.equal(bits(tensor[:half]), second[name])
                assert torch.equal(bits(tensor[half:]), second[name])
            hit = rig.lookup(hashes)
            assert paged.load(rig.worker, rig.joined, np.arange(half), hit.slots(), hit.words()).all()
            assert all(torch.equal(bits(tensor[:half]), first[name]) for name, tensor in tensors.items())
            hit.release()
            again.release()


def test_what_is_refused_moves_no_byte(server: Server) -> None:
    tensors = outermost_blocks(torch.bfloat16)
    paged = PagedKV(tensors)
    host = PagedKV(on_cpu(tensors))
    with engine(server, paged, "refused") as rig:
        _, lease = rig.reserve(2)
        with pytest.raises(InvalidInput, match="block_ids: 300 is out of range"):
            paged.store(rig.worker, rig.joined, [0, BLOCKS], lease.slots)
        with pytest.raises(InvalidInput, match="overlapping parts"):
            paged.store(rig.worker, rig.joined, [0, 1], [lease.slots[0]] * 2)
        with pytest.raises(InvalidInput, match="named twice"):
            paged.load(rig.worker, rig.joined, [1, 1], lease.slots, lease.words)
        with pytest.raises(InvalidInput, match="its memory is on GPU 0; this copies memory of the host"):
            rig.worker.store_blocks(paged.block_layout, rig.joined, 0, np.array([0, 1]), lease.slots)
        with pytest.raises(InvalidInput, match="its memory is the host's"):
            _kvmp.CudaLanes(host.block_layout)
        with pytest.raises(InvalidInput, match="all must be on one device"):
            PagedKV({"a": noise(4, 16), "b": noise(4, 16, device="cpu")})
        assert rig.worker.abort(lease.lease_id, lease.slots, lease.words) == 2


def test_a_slot_that_was_given_away_fails_the_load(server: Server) -> None:
    tensors = outermost_blocks(torch.bfloat16)
    paged = PagedKV(tensors)
    with engine(server, paged, "given-away") as rig:
        hashes, lease = rig.reserve(8)
        paged.store(rig.worker, rig.joined, np.arange(8), lease.slots)
        rig.commit(lease)
        hit = rig.lookup(hashes)
        words = hit.words().copy()
        words[3] += 1 << 16
        good = paged.load(rig.worker, rig.joined, np.arange(8), hit.slots(), words)
        assert good.tolist() == [True, True, True, False, True, True, True, True]
