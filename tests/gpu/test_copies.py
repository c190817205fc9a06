"""Copies between a GPU and the arena, byte for byte, held against what the CPU path finds in the same slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmp import _kvmp  # noqa: E402
from kvmp.errors import InvalidInput  # noqa: E402
from kvmp.paged import PagedKV  # noqa: E402
from kvmp.server import Server  # noqa: E402
from tests.gpu.rig import engine, served, until  # noqa: E402

pytestmark = pytest.mark.gpu

BLOCKS = 300
WAYS = ["batch", "single", "gather"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("2GiB") as server:
        yield server


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    """Random bytes, seen as `dtype`."""
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device).view(dtype).view(*shape)


def outermost_blocks(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """BLHNC: a block is one run over four layers."""
    whole = noise(BLOCKS, 4, 2, 16, 64, dtype=dtype)
    return {f"layer.{at}": whole[:, at] for at in range(4)}


def outermost_layers(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LBHNC: a run a layer and block."""
    whole = noise(4, BLOCKS, 2, 16, 64, dtype=dtype)
    return {f"layer.{at}": whole[at] for at in range(4)}


def kernel_blocks(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Four kernel blocks a block."""
    return {"layer": noise(4 * BLOCKS, 2, 16, 64, dtype=dtype)}


def heads_outermost(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LHBNC: short runs, far apart."""
    return {"layer": noise(8, BLOCKS, 16, 64, dtype=dtype).transpose(0, 1)}


def odd_bytes(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Runs that are no whole vectors, behind a start that is none either: the kernel cannot have them."""
    return {"layer": noise(BLOCKS * 77 + 3, dtype=dtype)[3:].view(BLOCKS, 7, 11)[:, :, :9]}


LAYOUTS = [outermost_blocks, outermost_layers, kernel_blocks, heads_outermost, odd_bytes]
DTYPES = [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32]


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same shapes and strides on the CPU, zeroed."""
    made = {}
    for name, tensor in tensors.items():
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        made[name] = torch.zeros(span, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return made


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.view(integer).cpu()


def rows(tensor: torch.Tensor, blocks: np.ndarray) -> torch.Tensor:
    """The named blocks of a tensor on the CPU, kernel blocks one behind the other."""
    ratio = tensor.shape[0] // BLOCKS
    return bits(tensor).unflatten(0, (BLOCKS, ratio))[torch.from_numpy(blocks)]


def registered_all(paged: PagedKV) -> bool:
    done, of, failure = paged.lanes.registration()
    assert failure is None
    return done == of > 0


def with_way(paged: PagedKV, way: str) -> PagedKV:
    paged._lanes = _kvmp.CudaLanes(paged._layout, way)
    assert paged.lanes.way == way
    return paged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_stored_is_what_the_cpu_finds_and_what_is_loaded(
    server: Server, way: str, make: Callable, dtype: torch.dtype
) -> None:
    if make is odd_bytes and way == "gather":
        pytest.skip("the kernel moves whole vectors only; test_a_layout_picks_its_way has what is used instead")
    tensors = make(dtype)
    paged, rng = with_way(PagedKV(tensors, num_blocks=BLOCKS), way), np.random.default_rng(1)
    host = on_cpu(tensors)
    mirror = PagedKV(host, num_blocks=BLOCKS)
    assert mirror.layout() == paged.layout()
    with engine(server, paged, f"{way}-{make.__name__}-{dtype}") as rig:
        paged.prepare(rig.worker)
        for count in (1, 3, BLOCKS - 43):
            source, target = rng.permutation(BLOCKS)[:count], rng.permutation(BLOCKS)[:count]
            hashes, lease = rig.reserve(count)
            paged.store(rig.worker, rig.joined, source, lease.slots)
            rig.commit(lease)
            hit = rig.lookup(hashes)
            assert mirror.load(rig.worker, rig.joined, source, hit.slots(), hit.words()).all()
            for name, tensor in tensors.items():
                assert torch.equal(rows(host[name], source), rows(tensor, source)), f"{count} blocks of {name}"
            expected = {name: bits(tensor).clone() for name, tensor in tensors.items()}
            for name, tensor in expected.items():
                grouped = tensor.unflatten(0, (BLOCKS, -1))
                grouped[torch.from_numpy(target)] = rows(tensors[name], source)
            assert paged.load(rig.worker, rig.joined, target, hit.slots(), hit.words()).all()
            for name, tensor in tensors.items():
                assert torch.equal(bits(tensor), expected[name]), f"{name}: other bytes than those named have changed"
            hit.release()


def test_a_layout_picks_its_way(server: Server) -> None:
    long_runs = {"layer": noise(8, 1 << 20, dtype=torch.uint8)}
    assert PagedKV(long_runs).lanes.way == "batch"
    assert PagedKV(outermost_layers(torch.bfloat16)).lanes.way == "gather"
    assert PagedKV(odd_bytes(torch.uint8)).lanes.way == "batch"


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_behind_the_work_that_was_given_to_the_gpu_before(server: Server, way: str) -> None:
    tensors = outermost_blocks(torch.bfloat16)
    paged = with_way(PagedKV(tensors), way)
    ids = np.arange(64)
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
    tensors = outermost_blocks(torch.bfloat16)
    paged, bell = PagedKV(tensors), _kvmp.Bell()
    ids = np.arange(256)
    with engine(server, paged, "aside") as rig:
        paged.prepare(rig.worker)
        until("all of the arena is registered", lambda: registered_all(paged))
        _, lease = rig.reserve(256)
        other_work = lambda: torch.zeros(1 << 20, device="cuda").sum().item()  # noqa: E731
        other_work()  # its kernels are loaded when they are first used, which waits for the whole GPU
        engine_stream = torch.cuda.Stream()
        with torch.cuda.stream(engine_stream):
            torch.cuda._sleep(2_000_000_000)
            late = engine_stream.record_event()
        copy = paged.begin_store(
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
            rig.worker.store_blocks(paged._layout, rig.joined, 0, np.array([0, 1]), lease.slots)
        with pytest.raises(InvalidInput, match="its memory is the host's"):
            _kvmp.CudaLanes(host._layout)
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
