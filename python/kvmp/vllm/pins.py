"""Engine blocks held while a store reads them: the engine may free them at any time, but not hand them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# Pins may hold this share of the engine's blocks, and stores on their way this share of its cache's bytes; beyond it
# stores wait for their turn. A long prompt's chunks are put up before the end of the first one's store is known: of a
# cache of 2.5 prompts those are more than half. An engine that preempts a request gets back what is not pinned.
CACHE_SHARE = 0.75


class Pins:
    """Counts references of ours in vLLM's block pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._held: Counter[int] = Counter()

    def bind(self, pool: Any) -> None:
        """Uses this block pool from now on."""
        self._pool = pool

    def __len__(self) -> int:
        return len(self._held)

    @property
    def room(self) -> int:
        """Blocks that may still be pinned; 0 without a pool."""
        if self._pool is None:
            return 0
        return max(0, int(len(self._pool.blocks) * CACHE_SHARE) - len(self._held))

    def pin(self, block_ids: Sequence[int]) -> None:
        """Takes one reference of each block."""
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])
        self._held.update(block_ids)

    def unpin(self, block_ids: Iterable[int]) -> None:
        """Gives one reference of each block back; the last of a chain goes first into the engine's eviction order."""
        given_back = list(block_ids)[::-1]
        for block_id in given_back:
            self._held[block_id] -= 1
            if not self._held[block_id]:
                del self._held[block_id]
        self._pool.free_blocks([self._pool.blocks[block_id] for block_id in given_back])

    def holds_last_reference(self) -> bool:
        """Whether some block would become free if its store ended."""
        return any(self._pool.blocks[block_id].ref_cnt <= count for block_id, count in self._held.items())
