"""What the scheduler side remembers of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvmp.vllm.link import Adapter, OpenNamespace

HASH_BYTES = 32


def hash_array(hashes: list[bytes]) -> np.ndarray:
    """Block hashes as uint8 ``(n, 32)``, shorter ones zero-padded on the right."""
    if not hashes:
        return np.zeros((0, HASH_BYTES), np.uint8)
    width = len(hashes[0])
    given = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), width)
    if width == HASH_BYTES:
        return given
    padded = np.zeros((len(hashes), HASH_BYTES), np.uint8)
    padded[:, :width] = given
    return padded


@dataclass
class Answer:
    """What a lookup brought.

    Attributes:
        tokens: length of the hit.
        lease: the read lease, None for a miss.
        at: when it came, monotonic seconds.
        asked: what was asked: number of hashes and the last of them.
    """

    tokens: int
    lease: Any
    at: float
    asked: tuple[int, bytes]


@dataclass
class RequestState:
    """One request from its arrival to its end.

    Attributes:
        request: vLLM's request.
        adapter: its LoRA adapter, None for none.
        cacheable: False when its identity cannot be had: neither looked up nor stored.
        namespace: the namespace everything below belongs to; a new one makes it void.
        pending: the lookup under way.
        asked: what that lookup asked.
        asked_at: when vLLM first asked for its answer, monotonic seconds.
        answer: the last lookup's answer.
        local_tokens: tokens resident on the engine when vLLM last asked.
        failed: a load failed; never asked again.
        loading: a load is under way.
        stored_blocks: blocks from the first on that are stored, or were tried.
        store_closed: the chain in the server is broken behind `stored_blocks`; storing on would find no parent.
        tainted: computed before a reset; not stored until it is computed anew.
    """

    request: Any
    adapter: Adapter | None = None
    cacheable: bool = True
    namespace: OpenNamespace | None = None
    pending: Any = None
    asked: tuple[int, bytes] = (0, b"")
    asked_at: float | None = None
    answer: Answer | None = None
    local_tokens: int = 0
    failed: bool = False
    loading: bool = False
    stored_blocks: int = 0
    store_closed: bool = False
    tainted: bool = False

    def forget_lookup(self) -> None:
        """Gives up the lookup under way and the lease of the last one."""
        pending, self.pending = self.pending, None
        answer, self.answer = self.answer, None
        self.asked_at = None
        if pending is not None:
            pending.abandon()
        if answer is not None and answer.lease is not None:
            answer.lease.release()

    def move_to(self, namespace: OpenNamespace) -> None:
        """Starts over in another namespace: a new server, another salt."""
        if namespace is not self.namespace:
            self.forget_lookup()
            self.namespace, self.stored_blocks, self.store_closed = namespace, 0, False
