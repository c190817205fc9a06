"""Copies between torch paged KV tensors and slots of the arena.

A :class:`PagedKV` describes a rank's KV tensors once, as runs of bytes that every block has; Rust then moves the
bytes with the GIL released: on the CPU by threads, on a CUDA device by two streams of its own.

How the bytes of a part are ordered is in :mod:`kvmp.runs`, and :meth:`PagedKV.layout` says it: two engines with equal
layouts have parts that are alike byte for byte, however their blocks and layers are arranged in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kvmp import _kvmp
from kvmp.copies import Copy, CudaLoad, EndedLoad, EndedStore, Load
from kvmp.errors import InvalidInput
from kvmp.runs import block_views, common_blocks, first_names, own_views, runs_of, runs_of_views

if TYPE_CHECKING:
    from kvmp.client import Client, Namespace

__all__ = ["Copy", "Load", "PagedKV", "runs_of"]


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
    way : optional, for tensors on a CUDA device
        How bytes move: "batch" (the copy engines, one driver call), "single" (the copy engines, a call a run) or
        "gather" (a kernel). By default what is fastest for the tensors' runs, of what the driver can do.
    width : int
        Multiprocessors that the kernel may take.

    Raises
    ------
    InvalidInput
        Naming the tensor that is on another device, has no blocks, or overlaps itself or another; or a `way` was
        given for the CPU.
    DeviceError
        The GPU cannot be used, or has no such `way`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        num_blocks: int | None = None,
        way: Literal["batch", "single", "gather"] | None = None,
        width: int = 16,
    ) -> None:
        self._tensors = dict(tensors)
        self._num_blocks = common_blocks(self._tensors) if num_blocks is None and tensors else num_blocks or 0
        self._views = block_views(self._tensors, self._num_blocks)
        self._device = _device(self._tensors)
        runs = runs_of_views(self._views)
        self._runs = len(runs)
        ordinal = None if self._device.type == "cpu" else self._device.index or 0
        if ordinal is None and way is not None:
            raise InvalidInput(f"way: {way!r} is how a CUDA device copies; these tensors are on the CPU")
        self._layout = _kvmp.BlockLayout(runs, self._num_blocks, ordinal)
        self._lanes = None if ordinal is None else _kvmp.CudaLanes(self._layout, way, width)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._device

    @property
    def lanes(self) -> _kvmp.CudaLanes | None:
        """What copies on a CUDA device; None on the CPU."""
        return self._lanes

    @property
    def block_layout(self) -> _kvmp.BlockLayout:
        """Where the bytes of each block lie, as ``Client.store_blocks`` and ``CudaLanes`` take it."""
        return self._layout

    @property
    def num_blocks(self) -> int:
        """Blocks that the tensors hold."""
        return self._num_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all tensors: what a part takes of a slot."""
        return sum(view.bytes for view in own_views(self._views))

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
        first = first_names(self._views)
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

    def forget(self, client: Client) -> None:
        """Let go of the client's arena, also of a closed client's: its segment may be gone by now.

        In the background it is made unknown to the device and unmapped, once no copy of it is under way. An arena that
        was not prepared, or is no more, is none to let go of.
        """
        if self._lanes is not None:
            self._lanes.unregister(client)

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

        As :meth:`begin_store`; on a CUDA device behind all work that the current stream has been given.
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

        As :meth:`begin_load`; on a CUDA device behind all work that the current stream has been given.

        Returns
        -------
        bool array (n,); where it is False the block holds garbage and must be recomputed.
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
