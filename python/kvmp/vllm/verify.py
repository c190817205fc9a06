"""`kvmp.verify`: sums of what a worker stores, and the check of what it loads.

With "always" every part is committed with its sum, and engines share only with engines that do so too: a part without
a sum cannot be checked, so it counts as damaged.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from kvmp.vllm.stats import KvmpStats

_GROUP = 0
_DAMAGED = 2  # of `Client.check_sums`
_DISTRUST_MS = 1000


class Verifier:
    """Used by the copy thread, off the engine's."""

    def __init__(self, on: bool, logger: logging.Logger, stats: KvmpStats):
        self._on = on
        self._logger = logger
        self._stats = stats
        self._warned = False

    def sums(self, client: Any, namespace: Any, slots: Any) -> Any:
        """xxh3-64 of this worker's part of each slot, uint64 (n,), once its copy has ended; None when off."""
        return client.part_sums(namespace, _GROUP, slots) if self._on else None

    def intact(self, client: Any, namespace: Any, slots: Any, words: Any) -> bool:
        """Whether every block that was loaded is as it was committed; those that are not leave the cache."""
        if not self._on:
            return True
        found = client.check_sums(namespace, _GROUP, slots, words)
        damaged = np.flatnonzero(found == _DAMAGED)
        if damaged.size:
            self._say(int(damaged.size))
            client.distrust(slots[damaged], words[damaged], timeout_ms=_DISTRUST_MS)
        return not np.any(found)

    def _say(self, blocks: int) -> None:
        self._stats.add("damaged_blocks", blocks)
        if not self._warned:
            self._warned = True
            self._logger.warning(
                "kvmp: the bytes of %d blocks are not those that were stored; they are evicted and computed again. "
                "Something wrote into the arena, or its memory is faulty; logged once, counted as kvmp_damaged_blocks",
                blocks,
            )
