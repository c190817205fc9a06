"""Runs of bytes computed from real tensors, held against torch's own indexing; guard bytes are all of the storage."""

import ctypes
import json
import secrets
import time
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import kvmp  # noqa: E402
from kvmp.client import Answer, Client  # noqa: E402
from kvmp.errors import InvalidInput  # noqa: E402
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec  # noqa: E402
from kvmp.paged import PagedKV, runs_of  # noqa: E402

DTYPES = [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64]


@dataclass(frozen=True)
class Recipe:
    """A tensor as a strided window of its own storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage_elements: int

    def storage(self, seed: int) -> torch.Tensor:
        noise = np.random.default_rng(seed).integers(0, 256, self.storage_elements * self.dtype.itemsize, np.uint8)
        return torch.from_numpy(noise)

    def window(self, storage: torch.Tensor) -> torch.Tensor:
        return storage.view(self.dtype).as_strided(self.shape, self.strides, self.offset)

    def bits(self, storage: torch.Tensor) -> torch.Tensor:
        """The same window as integers, which no copy changes, as it might a NaN."""
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]
        return storage.view(integer).as_strided(self.shape, self.strides, self.offset)


@st.composite
def recipes(draw: st.DrawFn, num_blocks: int) -> Recipe:
    """Any order of the dimensions in memory, the blocks among them, and gaps round each."""
    kernel_blocks = draw(st.integers(1, 3))
    shape = (num_blocks * kernel_blocks, *draw(st.lists(st.integers(1, 4), max_size=4)))
    strides, span = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        span += draw(st.integers(0, 2))
        strides[dim] = span
        span *= shape[dim]
    offset = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(DTYPES))
    return Recipe(dtype, shape, tuple(strides), offset, offset + span + 3)


@st.composite
def caches(draw: st.DrawFn) -> tuple[int, list[Recipe]]:
    num_blocks = draw(st.integers(1, 5))
    return num_blocks, draw(st.lists(recipes(num_blocks), min_size=1, max_size=3))


def named(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": tensor for i, tensor in enumerate(tensors)}


def store(runs: np.ndarray, block: int) -> np.ndarray:
    """The part of one block, gathered through raw addresses."""
    part = np.empty(int(runs[:, 2].sum()), np.uint8)
    for address, stride, length, offset in runs.tolist():
        part[offset : offset + length] = np.frombuffer(ctypes.string_at(address + block * stride, length), np.uint8)
    return part


def load(runs: np.ndarray, block: int, part: np.ndarray) -> None:
    for address, stride, length, offset in runs.tolist():
        piece = part[offset : offset + length].tobytes()
        ctypes.memmove(address + block * stride, piece, length)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes, elements in logical order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8).numpy()


def block_of(tensor: torch.Tensor, num_blocks: int, block: int) -> torch.Tensor:
    kernel_blocks = tensor.shape[0] // num_blocks
    return tensor[block * kernel_blocks : (block + 1) * kernel_blocks]


def unpack(part: np.ndarray, layout: dict) -> list[np.ndarray]:
    """Each tensor's block in logical order, from a part and what `layout()` says of it."""
    blocks, at = [], 0
    for entry in layout["tensors"]:
        if "same_as" in entry:
            continue
        item = getattr(torch, entry["dtype"]).itemsize
        count = int(np.prod(entry["shape"])) * item
        strides = (*(stride * item for stride in entry["strides"]), 1)
        view = np.lib.stride_tricks.as_strided(part[at : at + count], (*entry["shape"], item), strides)
        blocks.append(view.ravel())
        at += count
    assert at == part.size == layout["block_bytes"]
    return blocks


@given(caches(), st.data())
@settings(deadline=None)
def test_a_part_is_just_what_layout_says(cache, data):
    num_blocks, made = cache
    tensors = [recipe.window(recipe.storage(i)) for i, recipe in enumerate(made)]
    kv = PagedKV(named(tensors), num_blocks=num_blocks)
    runs = runs_of(named(tensors), num_blocks)
    block = data.draw(st.integers(0, num_blocks - 1))
    part = store(runs, block)
    assert kv.block_bytes == part.size == sum(raw(t).size for t in tensors) // num_blocks
    for tensor, bytes_of_block in zip(tensors, unpack(part, kv.layout()), strict=True):
        np.testing.assert_array_equal(bytes_of_block, raw(block_of(tensor, num_blocks, block)))
    assert json.loads(json.dumps(kv.layout())) == kv.layout()


@given(caches(), st.data())
@settings(deadline=None)
def test_a_load_changes_the_blocks_named_and_no_other_byte(cache, data):
    num_blocks, made = cache
    storages = [recipe.storage(i) for i, recipe in enumerate(made)]
    others = [recipe.storage(i + 100) for i, recipe in enumerate(made)]
    expected = [storage.clone() for storage in storages]
    target = runs_of(named([r.window(s) for r, s in zip(made, storages, strict=True)]), num_blocks)
    source = runs_of(named([r.window(s) for r, s in zip(made, others, strict=True)]), num_blocks)
    blocks = data.draw(st.lists(st.integers(0, num_blocks - 1), unique=True))
    for block in blocks:
        load(target, block, store(source, block))
        for recipe, want, other in zip(made, expected, others, strict=True):
            new = block_of(recipe.bits(other), num_blocks, block)
            block_of(recipe.bits(want), num_blocks, block).copy_(new)
    for storage, want in zip(storages, expected, strict=True):
        np.testing.assert_array_equal(storage.numpy(), want.numpy())


def test_the_comparison_tells_a_run_one_byte_too_long():
    """Negative control of the test above."""
    storage = torch.zeros(64, dtype=torch.uint8)
    runs = runs_of({"a": storage.as_strided((4, 8), (16, 1))}, 4)
    runs[:, 2] += 1
    load(runs, 1, np.ones(9, np.uint8))
    expected = torch.zeros(64, dtype=torch.uint8)
    expected.as_strided((4, 8), (16, 1))[1] = 1
    assert not torch.equal(storage, expected)


@given(caches())
@settings(deadline=None)
def test_runs_tile_the_part_and_are_coalesced(cache):
    num_blocks, made = cache
    runs = runs_of(named([recipe.window(recipe.storage(0)) for recipe in made]), num_blocks)
    address, stride, length, offset = runs.T
    assert runs.dtype == np.int64
    assert runs.flags.c_contiguous
    np.testing.assert_array_equal(offset, np.concatenate(([0], np.cumsum(length)[:-1])))
    assert not ((address[:-1] + length[:-1] == address[1:]) & (stride[:-1] == stride[1:])).any()


def layers(order: str, num_blocks: int = 6) -> list[torch.Tensor]:
    """vLLM's views [B, H, N, C] of one allocation laid out in `order`, outermost first; equal values in each order."""
    content = torch.arange(3 * num_blocks * 2 * 4 * 8, dtype=torch.float32).reshape(num_blocks, 3, 2, 4, 8)
    memory = content.permute(["BLHNC".index(dim) for dim in order]).contiguous()
    return list(memory.permute([order.index(dim) for dim in "LBHNC"]).unbind(0))


@pytest.mark.parametrize(
    ("order", "runs"), [("LBHNC", 3), ("LBNHC", 3), ("LHBNC", 6), ("BLHNC", 1), ("BLNHC", 1), ("BHLNC", 6)]
)
def test_vllm_layouts_give_the_longest_runs(order, runs):
    kv = PagedKV(named(layers(order)))
    assert (kv.runs, kv.num_blocks, kv.block_bytes) == (runs, 6, 3 * 2 * 4 * 8 * 4)


def test_layouts_are_equal_just_if_part_bytes_are():
    orders = ("LBHNC", "BLHNC", "LHBNC", "LBNHC")
    layout = {order: PagedKV(named(layers(order))).layout() for order in orders}
    part = {order: store(runs_of(named(layers(order)), 6), 5).tobytes() for order in orders}
    for order in orders:
        assert (layout[order] == layout["LBHNC"]) == (part[order] == part["LBHNC"]) == (order != "LBNHC")
    assert PagedKV(named(layers("LBHNC", num_blocks=9))).layout() == layout["LBHNC"]


def test_kernel_blocks_of_a_dense_tensor_are_one_run():
    kv = PagedKV(named([torch.zeros(12, 2, 4)]), num_blocks=3)
    assert (kv.runs, kv.block_bytes) == (1, 4 * 2 * 4 * 4)
    assert kv.layout()["tensors"][0]["shape"] == [4, 2, 4]


def test_a_tensor_shared_by_layers_is_copied_once():
    tensor = torch.zeros(4, 8)
    kv = PagedKV({"a": tensor, "b": torch.ones(4, 8), "c": tensor[:]})
    assert kv.block_bytes == 64
    assert kv.layout()["tensors"][2] == {"name": "c", "same_as": "a"}


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(1, 8).expand(4, 8), "expanded"),
        (torch.zeros(4, 1).expand(4, 8), "expanded"),
        (torch.zeros(64).as_strided((4, 8), (4, 1)), "overlapping"),
        (torch.zeros(4, 8, device="meta"), "meta"),
        (torch.zeros(()), "no blocks"),
        (torch.zeros(4, 0), "no blocks"),
        (torch.zeros(5, 8), "num_blocks=4"),
        (torch.zeros(4, 8).to_sparse(), "strided"),
        (np.zeros((4, 8)), "ndarray"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_by_name(tensor, says):
    with pytest.raises(InvalidInput, match=rf"(?s)layers\.7.*{says}"):
        runs_of({"ok": torch.zeros(4, 2), "layers.7": tensor}, 4)


@pytest.mark.parametrize("num_blocks", [0, -1, 2**32, True, 2.0])
def test_a_bad_number_of_blocks_is_refused(num_blocks):
    with pytest.raises(InvalidInput, match="num_blocks"):
        PagedKV({"a": torch.zeros(4, 2)}, num_blocks=num_blocks)


def test_no_tensors_or_no_common_number_of_blocks_is_refused():
    with pytest.raises(InvalidInput, match="at least one"):
        PagedKV({})
    with pytest.raises(InvalidInput, match=r"num_blocks.*differ"):
        PagedKV({"a": torch.zeros(4, 2), "b": torch.zeros(8, 2)})


def test_on_the_cpu_there_is_no_way_to_choose_and_no_arena_to_forget():
    kv = PagedKV({"a": torch.zeros(4, 2)})
    assert (kv.lanes, kv.block_layout.device, kv.block_layout.num_blocks) == (None, None, 4)
    np.testing.assert_array_equal(kv.block_layout.runs, runs_of({"a": kv._tensors["a"]}, 4))
    kv.forget(Recorder())
    with pytest.raises(InvalidInput, match="way: 'batch' is how a CUDA device copies"):
        PagedKV({"a": torch.zeros(4, 2)}, way="batch")


class Recorder:
    """Stands for a client: keeps what reaches it."""

    def __init__(self):
        self.calls = []

    def store_blocks(self, *args):
        self.calls.append(args)

    def load_blocks(self, *args):
        self.calls.append(args)
        return np.ones(len(args[3]), bool)


def test_calls_carry_arrays_of_the_fixed_types():
    kv, client = PagedKV({"a": torch.zeros(4, 2)}), Recorder()
    kv.store(client, "ns", [1, 2], np.array([7, 9], np.int64), group=1, threads=2)
    ok = kv.load(client, "ns", torch.tensor([3]), [5], [2**64 - 1])
    _, ns, group, ids, slots, threads, *epoch = client.calls[0]
    assert (ns, group, threads, epoch) == ("ns", 1, 2, [None])
    assert (ids.dtype, slots.dtype) == (np.int64, np.uint32)
    words = client.calls[1][5]
    assert (words.dtype, words.tolist(), ok.tolist()) == (np.uint64, [2**64 - 1], [True])
    kv.store(client, "ns", [], [])
    assert client.calls[2][3].dtype == np.int64


@pytest.mark.parametrize(
    ("ids", "slots", "words", "names"),
    [
        ([1.0], [1], [1], "block_ids"),
        ([[1]], [1], [1], "block_ids"),
        ([True], [1], [1], "block_ids"),
        ([1], [-1], [1], "slots"),
        ([1], [2**32], [1], "slots"),
        ([1, 2], [1], [1, 2], "slots"),
        ([1], [1], [], "words"),
        ([1], [1], [-1], "words"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_a_call(ids, slots, words, names):
    kv, client = PagedKV({"a": torch.zeros(4, 2)}), Recorder()
    with pytest.raises(InvalidInput, match=names):
        kv.load(client, "ns", ids, slots, words)
    assert client.calls == []


@pytest.fixture(scope="module")
def engine():
    with kvmp.launch("64MiB") as server, Client.connect(server.endpoint) as scheduler:
        token = scheduler.engine_token
        with Client.connect(server.endpoint, role="worker", engine_token=token, part=0) as worker:
            yield scheduler, worker


def reserved(scheduler, ns, hashes):
    """A lease on every hash; again while the server is still backing its memory."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        lease = scheduler.reserve(ns, hashes, first_block=0, timeout_ms=10_000)
        if (lease.answers == Answer.GRANTED).all():
            lease.handed_over()
            return lease
        lease.cancel()
    raise AssertionError("the server never granted the blocks")


@given(caches(), st.data())
@settings(deadline=None, max_examples=25)
def test_what_a_server_keeps_comes_back_and_no_other_byte_changes(engine, cache, data):
    scheduler, worker = engine
    num_blocks, made = cache
    sources = [recipe.storage(i) for i, recipe in enumerate(made)]
    targets = [recipe.storage(i + 100) for i, recipe in enumerate(made)]
    before, expected = [s.clone() for s in sources], [t.clone() for t in targets]
    source = PagedKV(named([r.window(s) for r, s in zip(made, sources, strict=True)]), num_blocks=num_blocks)
    target = PagedKV(named([r.window(t) for r, t in zip(made, targets, strict=True)]), num_blocks=num_blocks)
    blocks = data.draw(st.lists(st.integers(0, num_blocks - 1), unique=True, min_size=1))
    into = data.draw(st.permutations(range(num_blocks)))[: len(blocks)]
    part = PartSpec(bytes=(source.block_bytes,), layout=source.layout())
    groups = (GroupSpec(block_tokens=16),)
    ns = scheduler.open(NamespaceSpec(model="paged", facts={}, groups=groups, parts=(part,)))
    joined = worker.join(ns.id, ns.digest, json.dumps(source.layout()))
    hashes = np.frombuffer(secrets.token_bytes(32 * len(blocks)), np.uint8).reshape(-1, 32)
    lease = reserved(scheduler, ns, hashes)
    source.store(worker, joined, blocks, lease.slots)
    assert worker.commit(lease.lease_id, lease.slots, lease.words, timeout_ms=10_000) == len(blocks)
    with scheduler.lookup(ns, hashes, timeout_ms=10_000) as hit:
        assert target.load(worker, joined, into, hit.slots(), hit.words()).all()
    for recipe, want, old in zip(made, expected, before, strict=True):
        for to, block in zip(into, blocks, strict=True):
            new = block_of(recipe.bits(old), num_blocks, block)
            block_of(recipe.bits(want), num_blocks, to).copy_(new)
    for found, want in zip([*sources, *targets], [*before, *expected], strict=True):
        np.testing.assert_array_equal(found.numpy(), want.numpy())
