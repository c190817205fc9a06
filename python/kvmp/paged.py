"""Copies between torch paged KV tensors and slots of the arena.

A :class:`PagedKV` describes a rank's KV tensors once, as runs of bytes that every block has; Rust then moves the
bytes with the GIL released: on the CPU by threads, on a CUDA device by two streams of its own.

Part bytes are ordered so that runs stay long: tensor after tensor in the order given, and inside a tensor by
address within the block, gaps left out. :meth:`PagedKV.layout` says just that, so two engines with equal layouts
have parts that are alike byte for byte, however their blocks and layers are arranged in memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kvmp import _kvmp
from kvmp.copies import Copy, CudaLoad, EndedLoad, EndedStore, Load
from kvmp.errors import InvalidInput

if TYPE_CHECKING:
    from kvmp.client import Client, Namespace

__all__ = ["Copy", "Load", "PagedKV", "runs_of"]


@dataclass(frozen=True)
class _BlockView:
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


def _block_view(name: str, tensor: torch.Tensor, num_blocks: int) -> _BlockView:
    _check_tensor(name, tensor)
    _check_no_overlap(name, tensor)
    kernel_blocks, rest = divmod(tensor.shape[0], num_blocks)
    if rest:
        raise InvalidInput(f"{name}: dimension 0 has {tensor.shape[0]} blocks, no multiple of num_blocks={num_blocks}")
    item_bytes = tensor.element_size()
    strides = tuple(stride * item_bytes for stride in tensor.stride())
    return _BlockView(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        item_bytes=item_bytes,
        address=tensor.data_ptr(),
        block_stride=strides[0] * kernel_blocks,
        shape=(kernel_blocks, *tensor.shape[1:]),
        strides=strides,
    )


def _block_views(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> dict[str, _BlockView]:
    if not tensors:
        raise InvalidInput("tensors: at least one KV tensor is needed")
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 0 < num_blocks < 2**32:
        raise InvalidInput(f"num_blocks: a whole number from 1 to 2**32 - 1 is needed, got {num_blocks!r}")
    return {name: _block_view(name, tensor, num_blocks) for name, tensor in tensors.items()}


def _first_names(views: Mapping[str, _BlockView]) -> dict[str, str]:
    """For each tensor the first one that is the very same memory: layers may share a KV tensor."""
    first: dict[tuple[Any, ...], str] = {}
    keys = {name: (v.address, v.block_stride, v.dtype, v.shape, v.strides) for name, v in views.items()}
    return {name: first.setdefault(key, name) for name, key in keys.items()}


def _own_views(views: Mapping[str, _BlockView]) -> list[_BlockView]:
    first = _first_names(views)
    return [view for name, view in views.items() if first[name] == name]


def _coalesce(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Joins rows that lie end to end in memory and in the part, for every block."""
    address, stride, length, _ = runs.T
    goes_on = (address[:-1] + length[:-1] == address[1:]) & (stride[:-1] == stride[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    joined = runs[starts]
    joined[:, 2] = np.add.reduceat(length, starts)
    return joined


def _runs(views: Mapping[str, _BlockView]) -> NDArray[np.int64]:
    pieces, part_bytes = [], 0
    for view in _own_views(views):
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
    return _runs(_block_views(tensors, num_blocks))


def _common_blocks(tensors: Mapping[str, torch.Tensor]) -> int:
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidInput(f"num_blocks: must be given, as the tensors' first dimensions differ: {sizes}")
    return next(iter(sizes.values()), 0)


def _numbers(what: str, values: ArrayLike, dtype: type[np.integer[Any]], count: int | None = None) -> NDArray[Any]:
    """`values` as a one-dimensional array of `dtype`, refused if that would change a value."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidInput(f"{what}: a list of integers is needed, got {array.dtype} of shape {array.shape}")
    if count is not None and array.size != count:
        raise InvalidInput(f"{what}: {array.size} given for {count} block ids")
    limits = np.iinfo(dtype)
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise InvalidInput(f"{what}: values from {array.min()} to {array.max()} do not fit {limits.dtype}")
    return np.ascontiguousarray(array, dtype=dtype)


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    devices = {str(tensor.device): tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise InvalidInput(f"tensors: all must be on one device, got {', '.join(sorted(devices))}")
    return next(iter(devices.values()))


class PagedKV:
    """A rank's paged KV tensors of one group, described once as runs of bytes.

    Holds the tensors, so that their memory stays; they must not be resized. Copies of blocks that overlap in time
    are the caller's to keep apart.

    Parameters
    ----------
    tensors : mapping of name to tensor, all on the CPU or one CUDA device
        Dimension 0 is the blocks; any strides, any dtype. A tensor given under several names is copied once.
    num_blocks : int, optional
        Blocks, where tensors have several kernel blocks a block (``shape[0] % num_blocks == 0``). By default the
        tensors' common ``shape[0]``.

    Raises
    ------
    InvalidInput
        Naming the tensor that is on another device, has no blocks, or overlaps itself or another.
    DeviceError
        The GPU cannot be used.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, num_blocks: int | None = None) -> None:
        self._tensors = dict(tensors)
        self._num_blocks = _common_blocks(self._tensors) if num_blocks is None and tensors else num_blocks or 0
        self._views = _block_views(self._tensors, self._num_blocks)
        self._device = _device(self._tensors)
        runs = _runs(self._views)
        self._runs = len(runs)
        ordinal = None if self._device.type == "cpu" else self._device.index or 0
        self._layout = _kvmp.BlockLayout(runs, self._num_blocks, ordinal)
        self._lanes = None if ordinal is None else _kvmp.CudaLanes(self._layout)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._device

    @property
    def lanes(self) -> _kvmp.CudaLanes | None:
        """What copies on a CUDA device; None on the CPU."""
        return self._lanes

    @property
    def num_blocks(self) -> int:
        """Blocks that the tensors hold."""
        return self._num_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all tensors: what a part takes of a slot."""
        return sum(view.bytes for view in _own_views(self._views))

    @property
    def runs(self) -> int:
        """Runs of bytes a block, after coalescing."""
        return self._runs

    def layout(self) -> dict[str, Any]:
        """What shapes a part's bytes, as JSON values: for ``PartSpec.layout``.

        ``tensors`` lists the tensors in the order of their bytes, each with the shape of one block (kernel blocks
        first) and the strides, in elements, that it has in the part; a dimension of one element has stride 0. A
        tensor that is another one's memory says so with ``same_as`` and takes no bytes.
        """
        first = _first_names(self._views)
        tensors = [
            view.describe() if first[name] == name else {"name": name, "same_as": first[name]}
            for name, view in self._views.items()
        ]
        return {"block_bytes": self.block_bytes, "tensors": tensors}

    def record_event(self) -> torch.cuda.Event | None:
        """An event behind all that the device's current stream was given; None on the CPU, where that has ended."""
        return None if self._lanes is None else torch.cuda.current_stream(self._device).record_event()

    def prepare(self, client: Client) -> None:
        """Begin to make the client's arena known to the tensors' device, in the background; again, it costs nothing."""
        if self._lanes is not None:
            self._lanes.register(client)

    def trouble(self) -> str | None:
        """Why part of the arena will never be known to the device, whose copies are slower then; None for no reason."""
        return self._lanes.registration()[2] if self._lanes is not None else None

    def begin_store(
        self,
        client: Client,
        ns: Namespace,
        block_ids: ArrayLike,
        slots: ArrayLike,
        *,
        group: int = 0,
        threads: int | None = None,
        server_epoch: int | None = None,
        after: int | None = None,
        bell: _kvmp.Bell | None = None,
    ) -> Copy:
        """Begin to copy blocks into this client's part of slots under an open write lease.

        On a CUDA device this returns when the copy is submitted; on the CPU when all bytes are there. Until the copy
        has ended its blocks must not be written, and the slots be neither committed nor aborted.

        Parameters
        ----------
        block_ids, slots : integers of shape (n,); block ``block_ids[i]`` goes to slot ``slots[i]``
        threads : threads to copy with on the CPU; by default as many as help
        server_epoch : the write lease's; a client of another life of the server copies nothing
        after : ``cuda_event`` of a ``torch.cuda.Event`` behind which the copy goes; by default it goes at once
        bell : rung when the copy on a CUDA device has ended

        Raises
        ------
        InvalidInput
            A block id or slot out of range, or a slot named twice; then no byte has moved.
        LeaseError
            `server_epoch` is not the client's; then no byte has moved.
        DeviceError
            The GPU or its driver refused; the copy has ended.
        """
        ids = _numbers("block_ids", block_ids, np.int64)
        to = _numbers("slots", slots, np.uint32, ids.size)
        if self._lanes is not None:
            return self._lanes.store(client, ns, group, ids, to, after, bell, server_epoch)
        client.store_blocks(self._layout, ns, group, ids, to, threads, server_epoch)
        return EndedStore()

    def begin_load(
        self,
        client: Client,
        ns: Namespace,
        block_ids: ArrayLike,
        slots: ArrayLike,
        words: ArrayLike,
        *,
        group: int = 0,
        threads: int | None = None,
        after: int | None = None,
        bell: _kvmp.Bell | None = None,
    ) -> Load:
        """Begin to copy this client's part of leased slots into blocks; as :meth:`begin_store`.

        Parameters
        ----------
        block_ids, slots, words : integers of shape (n,); slot ``slots[i]`` with ``words[i]`` goes to ``block_ids[i]``

        Raises
        ------
        InvalidInput
            A block id or slot out of range, or a block id named twice; then no byte has moved.
        DeviceError
            The GPU or its driver refused; the copy has ended.
        """
        ids = _numbers("block_ids", block_ids, np.int64)
        source = _numbers("slots", slots, np.uint32, ids.size)
        leased = _numbers("words", words, np.uint64, ids.size)
        if self._lanes is not None:
            return CudaLoad(self._lanes.load(client, ns, group, ids, source, after, bell), client, source, leased)
        return EndedLoad(client.load_blocks(self._layout, ns, group, ids, source, leased, threads))

    def store(
        self,
        client: Client,
        ns: Namespace,
        block_ids: ArrayLike,
        slots: ArrayLike,
        *,
        group: int = 0,
        threads: int | None = None,
        server_epoch: int | None = None,
    ) -> None:
        """Copy blocks into this client's part of slots under an open write lease; returns when all bytes are there.

        On a CUDA device the copy goes behind all work that the current stream has been given.

        Parameters
        ----------
        block_ids, slots : integers of shape (n,); block ``block_ids[i]`` goes to slot ``slots[i]``
        threads : threads to copy with on the CPU; by default as many as help
        server_epoch : the write lease's; a client of another life of the server copies nothing

        Raises
        ------
        As :meth:`begin_store`.
        """
        with self._here() as after:
            copy = self.begin_store(
                client, ns, block_ids, slots, group=group, threads=threads, server_epoch=server_epoch, after=after
            )
            copy.wait()

    def load(
        self,
        client: Client,
        ns: Namespace,
        block_ids: ArrayLike,
        slots: ArrayLike,
        words: ArrayLike,
        *,
        group: int = 0,
        threads: int | None = None,
    ) -> NDArray[np.bool_]:
        """Copy this client's part of leased slots into blocks, then check that each slot was still the one leased.

        On a CUDA device the copy goes behind all work that the current stream has been given.

        Parameters
        ----------
        block_ids, slots, words : integers of shape (n,); slot ``slots[i]`` with ``words[i]`` goes to ``block_ids[i]``
        threads : threads to copy with on the CPU; by default as many as help

        Returns
        -------
        bool array (n,); where it is False the block holds garbage and must be recomputed.

        Raises
        ------
        As :meth:`begin_load`.
        """
        with self._here() as after:
            return self.begin_load(
                client, ns, block_ids, slots, words, group=group, threads=threads, after=after
            ).good()

    @contextlib.contextmanager
    def _here(self) -> Iterator[int | None]:
        """`record_event` as a handle; the event lives as long as it is used."""
        event = self.record_event()
        yield None if event is None else event.cuda_event

    def __repr__(self) -> str:
        return (
            f"PagedKV({len(self._tensors)} tensors, {self.num_blocks} blocks of {self.block_bytes} bytes"
            f" in {self.runs} runs)"
        )
