"""What the engine's thread and the copy thread share, under one lock: jobs queued, not wanted any more, ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kvmp import _kvmp
from kvmp.vllm.metadata import LoadJob, NamespaceRef, Refusal, SessionRef, StoreJob
from kvmp.vllm.pins import CACHE_SHARE

# What stores may have waiting and under way, at least. Bytes.
_STORE_BYTES = 1 << 30


def store_limit(cache_bytes: int) -> int:
    """Bytes of stores on their way beyond which one more is dropped: blocks fill faster than they are copied."""
    return max(_STORE_BYTES, int(cache_bytes * CACHE_SHARE))


@dataclass
class Ended:
    """Jobs that have ended since it was last taken.

    Attributes:
        loaded: requests whose load has ended, well or not.
        failed: those of them that failed.
        failed_blocks: their engine blocks.
        stored: job id -> blocks committed.
        refusals: where the server refuses this worker.
        closed: engine tokens with which this worker cannot go on.
    """

    loaded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    stored: dict[int, int] = field(default_factory=dict)
    refusals: set[Refusal] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Queued:
    """A job that waits.

    Attributes:
        job: what is to be copied.
        after: `torch.cuda.Event` behind which the copy goes, None for none.
        fits: whether it is to be copied at all; a store too many is only aborted.
    """

    job: LoadJob | StoreJob
    after: Any = None
    fits: bool = True


class Jobs:
    """The engine's thread queues and takes what has ended; the copy thread works them off. None of it waits."""

    def __init__(self, block_bytes: int, store_limit: int, bell: _kvmp.Bell):
        """
        Args:
            store_limit: bytes of stores that may wait and be under way; of one alone, any number.
            bell: rung when there is something for the copy thread.
        """
        self._block_bytes = block_bytes
        self._store_limit = store_limit
        self._bell = bell
        self._lock = threading.Lock()
        self._loads: deque[Queued] = deque()
        self._stores: deque[Queued] = deque()
        # Bytes of each store that is to be copied and has not ended.
        self._store_bytes: dict[int, int] = {}
        self._unended_loads: set[str] = set()
        self._cancelled: set[str] = set()
        self._void_below = 0
        self._followed: tuple[SessionRef, NamespaceRef | None] | None = None
        self._news = False
        self._ended = Ended()

    # The engine's thread.

    def add_load(self, job: LoadJob, after: Any) -> None:
        """Queues a load."""
        with self._lock:
            self._unended_loads.add(job.req_id)
            self._loads.append(Queued(job, after))
        self._bell.ring()

    def add_store(self, job: StoreJob, after: Any) -> None:
        """Queues a store, or its abort when too many bytes are on their way already."""
        with self._lock:
            wanted, on_way = len(job.block_ids) * self._block_bytes, sum(self._store_bytes.values())
            fits = not on_way or on_way + wanted <= self._store_limit
            if fits:
                self._store_bytes[job.job_id] = wanted
            self._stores.append(Queued(job, after, fits))
        self._bell.ring()

    def follow(self, session: SessionRef, namespace: NamespaceRef | None) -> None:
        """The scheduler's session now, and its namespace of plain requests."""
        with self._lock:
            if self._followed == (session, namespace):
                return
            self._followed, self._news = (session, namespace), True
        self._bell.ring()

    def cancel(self, req_ids: frozenset[str], void_below: int) -> None:
        """Cuts these loads short, and has no store with a smaller job id committed."""
        with self._lock:
            self._cancelled |= req_ids & self._unended_loads
            self._void_below = max(self._void_below, void_below)

    def take_ended(self) -> Ended:
        """What has ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, Ended()
            return ended

    # The copy thread.

    def waiting(self) -> bool:
        """Whether there is anything to take."""
        with self._lock:
            return bool(self._news or self._loads or self._stores)

    def take(self) -> Queued | None:
        """The next job: loads before stores, as a request waits for each."""
        with self._lock:
            queue = self._loads or self._stores
            return queue.popleft() if queue else None

    def take_news(self) -> tuple[SessionRef, NamespaceRef | None] | None:
        """The scheduler's session, if it has changed since the last call."""
        with self._lock:
            news, self._news = self._news, False
            return self._followed if news else None

    def is_cancelled(self, job: LoadJob) -> bool:
        """Whether nobody wants this load any more."""
        return job.req_id in self._cancelled

    def is_void(self, job: StoreJob) -> bool:
        """Whether this store must not be committed."""
        return job.job_id < self._void_below

    def load_ended(self, job: LoadJob, good: bool) -> None:
        """Reports a load; exactly once, or its request would hang."""
        with self._lock:
            self._unended_loads.discard(job.req_id)
            self._cancelled.discard(job.req_id)
            self._ended.loaded.add(job.req_id)
            if not good:
                self._ended.failed.add(job.req_id)
                self._ended.failed_blocks.update(job.block_ids.tolist())

    def store_ended(self, job: StoreJob, committed: int) -> None:
        """Reports a store; exactly once, or its blocks would stay pinned."""
        with self._lock:
            self._store_bytes.pop(job.job_id, None)
            self._ended.stored[job.job_id] = committed

    def refused(self, refusal: Refusal) -> None:
        """Reports where the server refuses this worker."""
        with self._lock:
            self._ended.refusals.add(refusal)

    def closed(self, tokens: Iterable[int]) -> None:
        """Reports engine tokens with which this worker cannot go on."""
        with self._lock:
            self._ended.closed.update(tokens)
