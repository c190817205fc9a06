"""Engine blocks held while a store reads them: the engine may free them at any time, but not hand them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# Pins may keep this share of blocks from an engine that is done with them; beyond it stores wait for their turn.
_SHARE = 0.5
# And this share at all: an engine that preempts a request gets back what is not pinned.
_MOST = 0.75


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

    def room(self, wanted: int) -> int:
        """How many of `wanted` more blocks may be pinned; 0 without a pool.

        What a request still uses counts for the larger share only: the engine could not hand it out anyway.
        """
        if self._pool is None:
            return 0
        blocks, held = len(self._pool.blocks), len(self._held)
        room = int(blocks * _SHARE) - held
        if room < wanted:  # Only then is each looked at.
            last = sum(self._is_last(*pin) for pin in self._held.items())
            room = min(int(blocks * _SHARE) - last, int(blocks * _MOST) - held)
        return max(0, min(wanted, room))

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
        return any(self._is_last(*pin) for pin in self._held.items())

    def _is_last(self, block_id: int, count: int) -> bool:
        return self._pool.blocks[block_id].ref_cnt <= count
