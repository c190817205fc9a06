"""The worker's copy thread: one thread, one job at a time, loads before stores, each job reported exactly once.

queued -> copying -> checked -> done | failed              a load
queued -> copying -> committed | aborted | not begun       a store
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmp.vllm.joined import Membership, NotJoinedError, RefusedError
from kvmp.vllm.metadata import LoadJob, StoreJob
from kvmp.vllm.stats import KvmpStats

# Tests only: sleeps this long after each block, so that a test can act while a copy is part done. Milliseconds.
SLOW_COPY_VARIABLE = "KVMP_TEST_SLOW_COPY_MS"
# Stores waiting beyond this are dropped: the engine fills blocks faster than they can be copied. Bytes.
_WAITING_BYTES = 1 << 30
_COMMIT_MS = 1000
# An idle worker sees a hang-up at the latest this much later. Seconds.
_WATCH_S = 0.2
# Stores given up while the server could not be told, at most.
_OWED = 4096
_STOP_S = 5.0


@dataclass
class Ended:
    """Jobs that have ended since it was last taken.

    Attributes:
        loaded: requests whose load has ended, well or not.
        failed: those of them that failed.
        failed_blocks: their engine blocks.
        stored: job id -> blocks committed.
        refusal: why the server refuses this worker, empty when it does not.
    """

    loaded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    stored: dict[int, int] = field(default_factory=dict)
    refusal: str = ""


class Copier:
    """Runs copies beside the engine's thread, which only queues jobs and collects what has ended."""

    def __init__(self, paged: Any, membership: Membership, logger: logging.Logger, stats: KvmpStats):
        """
        Args:
            paged: the `kvmp.paged.PagedKV` over this worker's cache.
        """
        self._paged = paged
        self._membership = membership
        self._logger = logger
        self._stats = stats
        self._block_bytes = paged.block_bytes
        self._slow_s = float(os.environ.get(SLOW_COPY_VARIABLE, 0)) / 1000
        self._condition = threading.Condition()
        self._loads: deque[LoadJob] = deque()
        self._stores: deque[tuple[StoreJob, bool]] = deque()
        self._unended_loads: set[str] = set()
        self._cancelled: set[str] = set()
        self._void_below = 0
        self._waiting_bytes = 0
        self._owed: deque[StoreJob] = deque(maxlen=_OWED)
        self._ended = Ended()
        self._stopping = False
        self._seen: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="kvmp-copy", daemon=True)
        self._thread.start()

    # The engine's thread.

    def load(self, job: LoadJob) -> None:
        """Queues a load."""
        with self._condition:
            self._unended_loads.add(job.req_id)
            self._loads.append(job)
            self._condition.notify()

    def store(self, job: StoreJob) -> None:
        """Queues a store, or its abort when too many bytes wait already."""
        size = len(job.block_ids) * self._block_bytes
        with self._condition:
            fits = not self._stores or self._waiting_bytes + size <= _WAITING_BYTES
            self._waiting_bytes += size
            self._stores.append((job, fits))
            self._condition.notify()

    def cancel(self, req_ids: frozenset[str], void_below: int) -> None:
        """Cuts these loads short, and has no store with a smaller job id committed."""
        with self._condition:
            self._cancelled |= req_ids & self._unended_loads
            self._void_below = max(self._void_below, void_below)

    def take_ended(self) -> Ended:
        """What has ended since the last call."""
        with self._condition:
            ended, self._ended = self._ended, Ended()
            return ended

    def stop(self) -> None:
        """Ends the thread after the copy under way."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(_STOP_S)

    # The copy thread.

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if isinstance(job, LoadJob):
                self._run_load(job)
            else:
                self._run_store(*job)
        self._membership.close()

    def _next(self) -> LoadJob | tuple[StoreJob, bool] | None:
        while not self._await_work():
            self._membership.watch()
        with self._condition:
            if self._stopping:
                return None
            if self._loads:
                return self._loads.popleft()
            job, fits = self._stores.popleft()
            self._waiting_bytes -= len(job.block_ids) * self._block_bytes
            return job, fits

    def _await_work(self) -> bool:
        """False when there was none for a while."""
        wait_s = _WATCH_S if self._membership.joined else None
        with self._condition:
            return bool(self._condition.wait_for(lambda: self._stopping or self._loads or self._stores, wait_s))

    def _run_load(self, job: LoadJob) -> None:
        try:
            good = self._load(job)
        except BaseException as error:  # A job that is never reported would hang its request.
            good = False
            self._note("a load failed", error)
        with self._condition:
            self._unended_loads.discard(job.req_id)
            self._cancelled.discard(job.req_id)
            self._ended.loaded.add(job.req_id)
            if not good:
                self._ended.failed.add(job.req_id)
                self._ended.failed_blocks.update(job.block_ids.tolist())

    def _load(self, job: LoadJob) -> bool:
        if job.session is None or job.namespace is None:
            return False
        client, namespace = self._membership.for_load(job.session, job.namespace)
        for at in self._pieces(len(job.block_ids)):
            if job.req_id in self._cancelled:
                return False
            ok = self._paged.load(client, namespace, job.block_ids[at], job.slots[at], job.words[at])
            if not np.all(ok):
                return False
        return job.req_id not in self._cancelled

    def _run_store(self, job: StoreJob, fits: bool) -> None:
        committed, refusal = 0, ""
        try:
            committed = self._store(job, fits)
        except RefusedError as refused:
            refusal = str(refused)
        except BaseException as error:  # A job that is never reported would keep its blocks pinned.
            self._note("a store failed", error)
        with self._condition:
            self._ended.stored[job.job_id] = committed
            self._ended.refusal = self._ended.refusal or refusal

    def _store(self, job: StoreJob, fits: bool) -> int:
        """Blocks committed. Whatever is not committed is aborted, now or as soon as the server can be told."""
        try:
            client, namespace = self._membership.for_store(job.session, job.namespace)
        except NotJoinedError:
            self._owed.append(job)
            raise
        self._pay_owed(client, job)
        if not fits or self._is_void(job) or not self._copied(client, namespace, job) or self._is_void(job):
            client.abort(job.lease_id, job.slots, job.words, timeout_ms=_COMMIT_MS)
            return 0
        return client.commit(job.lease_id, job.slots, job.words, timeout_ms=_COMMIT_MS)

    def _copied(self, client: Any, namespace: Any, job: StoreJob) -> bool:
        try:
            for at in self._pieces(len(job.block_ids)):
                self._paged.store(client, namespace, job.block_ids[at], job.slots[at])
        except BaseException as error:
            self._note("a copy failed", error)
            return False
        return True

    def _is_void(self, job: StoreJob) -> bool:
        return job.job_id < self._void_below

    def _pay_owed(self, client: Any, job: StoreJob) -> None:
        """Aborts what could not be aborted when it was given up; leases of another session died with it."""
        while self._owed:
            other = self._owed.popleft()
            if other.session == job.session:
                client.abort(other.lease_id, other.slots, other.words, timeout_ms=_COMMIT_MS)

    def _pieces(self, blocks: int):
        if not self._slow_s:
            yield slice(0, blocks)
            return
        for at in range(blocks):
            yield slice(at, at + 1)
            time.sleep(self._slow_s)

    def _note(self, what: str, error: BaseException) -> None:
        self._stats.add("errors")
        cause = f"{what}: {type(error).__name__}"
        if cause not in self._seen:
            self._seen.add(cause)
            self._logger.warning("kvmp: %s (%s); logged once for this cause", cause, error)
