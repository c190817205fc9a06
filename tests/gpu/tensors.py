"""KV tensors on the GPU in each memory order, and their like on the CPU, with which kvmp's CPU path sees its slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvmp.client import ReadLease, WriteLease
from kvmp.paged import PagedKV
from tests.gpu.rig import Rig

BLOCKS = 300


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    """Random bytes, seen as `dtype`."""
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device).view(dtype).view(*shape)


def outermost_blocks(dtype: torch.dtype, blocks: int = BLOCKS, head: int = 64) -> dict[str, torch.Tensor]:
    """BLHNC: a block is one run over four layers."""
    whole = noise(blocks, 4, 2, 16, head, dtype=dtype)
    return {f"layer.{at}": whole[:, at] for at in range(4)}


def outermost_layers(dtype: torch.dtype, blocks: int = BLOCKS, head: int = 64) -> dict[str, torch.Tensor]:
    """LBHNC: a run a layer and block."""
    whole = noise(4, blocks, 2, 16, head, dtype=dtype)
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


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same shapes and strides on the CPU, zeroed."""
    made = {}
    for name, tensor in tensors.items():
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        made[name] = torch.zeros(span, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return made


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers on the CPU: a NaN is equal to itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.view(integer).cpu()


class Twin:
    """Tensors on the GPU and their like on the CPU, each with the `PagedKV` over it."""

    def __init__(self, tensors: dict[str, torch.Tensor], *, way: str | None = None, blocks: int = BLOCKS):
        """`way`: how registered memory is moved; None leaves it to the layout."""
        self.tensors = tensors
        self.blocks = blocks
        self.paged = PagedKV(tensors, num_blocks=blocks, way=way)
        assert way in (None, self.paged.lanes.way)
        self.host = on_cpu(tensors)
        self.mirror = PagedKV(self.host, num_blocks=blocks)
        assert self.mirror.layout() == self.paged.layout()

    def rows(self, ids: Any) -> dict[str, torch.Tensor]:
        """The GPU's blocks, kernel blocks one behind the other, as integers on the CPU."""
        return {name: self._rows(tensor, ids) for name, tensor in self.tensors.items()}

    def check_slots(self, rig: Rig, ids: np.ndarray, hit: ReadLease) -> None:
        """The slots of the lease hold, for the CPU path, what the GPU has in these blocks now."""
        assert self.mirror.load(rig.worker, rig.joined, ids, hit.slots(), hit.words()).all()
        for name, rows in self.rows(ids).items():
            assert torch.equal(self._rows(self.host[name], ids), rows), f"{len(ids)} blocks of {name}"

    def check_round_trip(self, rig: Rig, hashes: np.ndarray, lease: WriteLease) -> None:
        """Stores into the lease's slots, and loads them again into other blocks: every byte is there, each time."""
        rng, count = np.random.default_rng(3), len(lease.slots)
        source, target = rng.permutation(self.blocks)[:count], rng.permutation(self.blocks)[:count]
        self.paged.store(rig.worker, rig.joined, source, lease.slots)
        rig.commit(lease)
        hit = rig.lookup(hashes)
        self.check_slots(rig, source, hit)
        stored = self.rows(source)
        for tensor in self.tensors.values():
            tensor.zero_()
        assert self.paged.load(rig.worker, rig.joined, target, hit.slots(), hit.words()).all()
        loaded = self.rows(target)
        assert all(torch.equal(loaded[name], rows) for name, rows in stored.items())
        hit.release()

    def _rows(self, tensor: torch.Tensor, ids: Any) -> torch.Tensor:
        ratio = tensor.shape[0] // self.blocks
        return bits(tensor).unflatten(0, (self.blocks, ratio))[torch.as_tensor(ids)]
