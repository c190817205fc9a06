"""Copies that were begun: what :class:`kvmp.paged.PagedKV` gives out until the last byte has moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvmp import _kvmp
    from kvmp.client import Client


class Copy(Protocol):
    """A copy that was begun."""

    def has_ended(self) -> bool:
        """Whether the last byte has moved; often asked, it costs nothing.

        Raises DeviceError where the device failed, which may be seen a moment later: what was moved is garbage.
        """

    def wait(self) -> None:
        """Sleeps until the last byte has moved; raises as :meth:`has_ended`."""


class Load(Copy, Protocol):
    """A load that was begun."""

    def good(self) -> NDArray[np.bool_]:
        """Once it has ended: bool (n,), False where the slot was not the one leased all the while.

        There the block holds garbage and must be recomputed.
        """


class EndedStore:
    """A store on the CPU: over once it was begun."""

    def has_ended(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class EndedLoad(EndedStore):
    """A load on the CPU."""

    def __init__(self, good: NDArray[np.bool_]) -> None:
        self._good = good

    def good(self) -> NDArray[np.bool_]:
        return self._good


class CudaLoad:
    """A load on a CUDA device; the words are looked at when it has ended, not before."""

    def __init__(
        self, transfer: _kvmp.Transfer, client: Client, slots: NDArray[np.uint32], words: NDArray[np.uint64]
    ) -> None:
        self._transfer = transfer
        self._client = client
        self._slots = slots
        self._words = words

    def has_ended(self) -> bool:
        return self._transfer.has_ended()

    def wait(self) -> None:
        self._transfer.wait()

    def good(self) -> NDArray[np.bool_]:
        self._transfer.wait()
        return self._client.check(self._slots, self._words)
