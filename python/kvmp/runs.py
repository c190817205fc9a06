"""Torch paged KV tensors as runs of bytes: what every block has, and where each run lies in a part.

Part bytes are ordered so that runs stay long: tensor after tensor in the order given, and inside a tensor by address
within the block, gaps left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvmp.errors import InvalidInput


@dataclass(frozen=True)
class BlockView:
    """One tensor, seen as blocks. Dimension 0 is the kernel blocks of a block; sizes in elements, strides in bytes."""

    name: str
    dtype: str
    item_bytes: int
    address: int
    block_stride: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes

    def inner_to_outer(self) -> list[int]:
        """Dimensions of more than one element, by their stride in memory."""
        return sorted((d for d, size in enumerate(self.shape) if size > 1), key=lambda d: self.strides[d])

    def part_strides(self) -> list[int]:
        """Strides in elements once gaps are left out; 0 for a dimension of one element."""
        strides, packed = [0] * len(self.shape), 1
        for dim in self.inner_to_outer():
            strides[dim] = packed
            packed *= self.shape[dim]
        return strides

    def runs(self) -> NDArray[np.int64]:
        """Rows [address, block stride, length, offset in this tensor's share of the part], by address."""
        length, offsets = self.item_bytes, np.zeros(1, np.int64)
        for dim in self.inner_to_outer():
            size, stride = self.shape[dim], self.strides[dim]
            if offsets.size == 1 and stride == length:
                length *= size
            else:
                offsets = np.add.outer(np.arange(size, dtype=np.int64) * stride, offsets).ravel()
        runs = np.empty((offsets.size, 4), np.int64)
        runs[:, 0] = self.address + offsets
        runs[:, 1] = self.block_stride
        runs[:, 2] = length
        runs[:, 3] = np.arange(offsets.size, dtype=np.int64) * length
        return runs

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "strides": self.part_strides()}


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInput(f"{name}: a torch.Tensor is needed, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise InvalidInput(f"{name}: the tensor's layout is {tensor.layout}; only strided tensors have runs of bytes")
    if not (tensor.device.type == "cpu" or (tensor.device.type == "cuda" and torch.version.cuda)):
        raise InvalidInput(f"{name}: the tensor is on {tensor.device}; kvmp copies CPU and CUDA tensors")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise InvalidInput(f"{name}: shape {tuple(tensor.shape)} holds no blocks; dimension 0 must be the blocks")


def _check_no_overlap(name: str, tensor: torch.Tensor) -> None:
    """Every dimension must step over all that the ones inside it span, so that no two elements share memory."""
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    span = 1
    for stride, size in dims:
        if stride < span:
            raise InvalidInput(
                f"{name}: shape {tuple(tensor.shape)} with strides {tensor.stride()} puts several elements at one"
                " address or interleaves dimensions (expanded or overlapping view); give the tensor itself"
            )
        span += stride * (size - 1)


def _block_view(name: str, tensor: torch.Tensor, num_blocks: int) -> BlockView:
    _check_tensor(name, tensor)
    _check_no_overlap(name, tensor)
    kernel_blocks, rest = divmod(tensor.shape[0], num_blocks)
    if rest:
        raise InvalidInput(f"{name}: dimension 0 has {tensor.shape[0]} blocks, no multiple of num_blocks={num_blocks}")
    item_bytes = tensor.element_size()
    strides = tuple(stride * item_bytes for stride in tensor.stride())
    return BlockView(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        item_bytes=item_bytes,
        address=tensor.data_ptr(),
        block_stride=strides[0] * kernel_blocks,
        shape=(kernel_blocks, *tensor.shape[1:]),
        strides=strides,
    )


def block_views(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> dict[str, BlockView]:
    """Each tensor as blocks; InvalidInput names the one that cannot be."""
    if not tensors:
        raise InvalidInput("tensors: at least one KV tensor is needed")
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 0 < num_blocks < 2**32:
        raise InvalidInput(f"num_blocks: a whole number from 1 to 2**32 - 1 is needed, got {num_blocks!r}")
    return {name: _block_view(name, tensor, num_blocks) for name, tensor in tensors.items()}


def first_names(views: Mapping[str, BlockView]) -> dict[str, str]:
    """For each tensor the first one that is the very same memory: layers may share a KV tensor."""
    first: dict[tuple[Any, ...], str] = {}
    keys = {name: (v.address, v.block_stride, v.dtype, v.shape, v.strides) for name, v in views.items()}
    return {name: first.setdefault(key, name) for name, key in keys.items()}


def own_views(views: Mapping[str, BlockView]) -> list[BlockView]:
    """Those that are not another one's memory, in the order of their bytes."""
    first = first_names(views)
    return [view for name, view in views.items() if first[name] == name]


def _coalesce(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Joins rows that lie end to end in memory and in the part, for every block."""
    address, stride, length, _ = runs.T
    goes_on = (address[:-1] + length[:-1] == address[1:]) & (stride[:-1] == stride[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    joined = runs[starts]
    joined[:, 2] = np.add.reduceat(length, starts)
    return joined


def runs_of_views(views: Mapping[str, BlockView]) -> NDArray[np.int64]:
    """As :func:`runs_of`."""
    pieces, part_bytes = [], 0
    for view in own_views(views):
        runs = view.runs()
        runs[:, 3] += part_bytes
        part_bytes += view.bytes
        pieces.append(runs)
    return _coalesce(np.concatenate(pieces))


def runs_of(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> NDArray[np.int64]:
    """Runs of bytes of every block: block ``b`` has run ``r`` at ``r[0] + b * r[1]``.

    Parameters
    ----------
    tensors : mapping of name to tensor, all on the CPU or one CUDA device; dimension 0 the blocks, any strides, dtype
    num_blocks : blocks, of one or several kernel blocks each

    Returns
    -------
    int64 array (n, 4): address, block stride, length, offset in the part; all in bytes, by part offset.

    Raises
    ------
    InvalidInput
        A tensor on another device, that has no blocks, overlaps itself, or is no multiple of `num_blocks` long.
    """
    return runs_of_views(block_views(tensors, num_blocks))


def common_blocks(tensors: Mapping[str, torch.Tensor]) -> int:
    """The tensors' common first dimension."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidInput(f"num_blocks: must be given, as the tensors' first dimensions differ: {sizes}")
    return next(iter(sizes.values()), 0)
