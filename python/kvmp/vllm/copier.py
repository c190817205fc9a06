"""The worker's copy thread: one thread, one job at a time, loads before stores, each job reported exactly once.

queued -> copying -> checked -> done | failed              a load
queued -> copying -> committed | aborted | not begun       a store

Between two jobs no copy runs: there the thread leaves sessions that its scheduler has left or whose server is gone,
joins the scheduler's new one, and pays what is owed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmp import errors
from kvmp.vllm.joined import LeftError, Membership, NotJoinedError, RefusedError
from kvmp.vllm.metadata import LoadJob, NamespaceRef, Refusal, SessionRef, StoreJob
from kvmp.vllm.owed import Owed
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.verify import Verifier

# Tests only: sleeps this long after each block, so that a test can act while a copy is part done. Milliseconds.
SLOW_COPY_VARIABLE = "KVMP_TEST_SLOW_COPY_MS"
# Stores waiting beyond this are dropped: the engine fills blocks faster than they can be copied. Bytes.
_WAITING_BYTES = 1 << 30
_COMMIT_MS = 1000
# An idle worker sees a hang-up at the latest this much later. Seconds.
_WATCH_S = 0.2
_STOP_S = 5.0
_SERVER_AWAY = (NotJoinedError, errors.ServerLost, errors.BoundExceeded)
# After a fault of its own the thread goes on this much later. Seconds.
_PAUSE_S = 0.05


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


class SuspendedError(Exception):
    """No copy may touch the tensors now."""


class Copier:
    """Runs copies beside the engine's thread, which only queues jobs and collects what has ended."""

    def __init__(
        self, paged: Any, membership: Membership, logger: logging.Logger, stats: KvmpStats, *, verify: bool = False
    ):
        """
        Args:
            paged: the `kvmp.paged.PagedKV` over this worker's cache.
            verify: whether parts are committed with their sums, and checked after a load.
        """
        self._paged = paged
        self._membership = membership
        self._logger = logger
        self._stats = stats
        self._verifier = Verifier(verify, logger, stats)
        self._block_bytes = paged.block_bytes
        self._slow_s = float(os.environ.get(SLOW_COPY_VARIABLE, 0)) / 1000
        self._condition = threading.Condition()
        self._loads: deque[LoadJob] = deque()
        self._stores: deque[tuple[StoreJob, bool]] = deque()
        self._unended_loads: set[str] = set()
        self._cancelled: set[str] = set()
        self._void_below = 0
        self._waiting_bytes = 0
        self._owed = Owed(membership, _COMMIT_MS)
        self._followed: tuple[SessionRef, NamespaceRef | None] | None = None
        self._news = False
        self._ended = Ended()
        self._stopping = False
        self._suspended = False
        self._copying = False
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

    def follow(self, session: SessionRef, namespace: NamespaceRef | None) -> None:
        """The scheduler's session now, and its namespace of plain requests."""
        with self._condition:
            if self._followed != (session, namespace):
                self._followed, self._news = (session, namespace), True
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

    def suspend(self) -> None:
        """Touches no tensor from now on: their memory is about to go. Returns when the copy under way has ended.

        That wait has no bound, because a copy that goes on would read memory that is not there; it is one job's bytes.
        Until `resume`, loads fail and stores are aborted.
        """
        with self._condition:
            self._suspended = True
            self._condition.wait_for(lambda: not self._copying)

    def resume(self) -> None:
        """Copies again: the tensors have memory at the addresses they had."""
        with self._condition:
            self._suspended = False

    def stop(self) -> None:
        """Ends the thread after the copy under way."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(_STOP_S)

    # The copy thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except BaseException as error:  # The thread ends with its engine, not before: jobs would hang.
                with contextlib.suppress(BaseException):
                    self._note("the copy thread failed", error)
                with self._condition:
                    self._condition.wait_for(lambda: self._stopping, _PAUSE_S)
        self._membership.close()

    def _turn(self) -> None:
        """One job, or what is to be done while there is none."""
        self._await_work()
        if self._stopping:
            return
        try:
            self._tend()
        except BaseException as error:  # The jobs are run all the same, each by its own luck.
            self._note("looking after the session failed", error)
        job = self._next()
        if isinstance(job, LoadJob):
            self._run_load(job)
        elif job is not None:
            self._run_store(*job)

    def _await_work(self) -> None:
        """Returns when there is some, or after a while in which a server may have gone."""
        wait_s = _WATCH_S if self._membership.watchful or self._owed else None
        with self._condition:
            self._condition.wait_for(lambda: self._stopping or self._news or self._loads or self._stores, wait_s)

    def _next(self) -> LoadJob | tuple[StoreJob, bool] | None:
        with self._condition:
            if self._loads:
                return self._loads.popleft()
            if not self._stores:
                return None
            job, fits = self._stores.popleft()
            self._waiting_bytes -= len(job.block_ids) * self._block_bytes
            return job, fits

    def _tend(self) -> None:
        with self._condition:
            followed, news, self._news = self._followed, self._news, False
        try:
            self._membership.watch()
            if followed is not None and news:
                self._join_early(*followed)
            self._owed.drop_left()
            self._pay_owed()
        finally:
            closed = self._membership.take_closed()
            with self._condition:
                self._ended.closed |= closed

    def _join_early(self, session: SessionRef, namespace: NamespaceRef | None) -> None:
        self._membership.follow(session)
        try:
            self._membership.join(session, namespace)
        except RefusedError as refused:
            with self._condition:
                self._ended.refusals.add(Refusal(session, namespace, str(refused)))
        except NotJoinedError as error:
            # The first job tries again, and says so if it fails.
            self._logger.debug("kvmp: not joined yet: %s", error)

    def _pay_owed(self) -> None:
        session = self._membership.session
        if self._owed and session is not None and not self._membership.lost:
            self._owed.pay(self._membership.client, session)

    def _run_load(self, job: LoadJob) -> None:
        good = False
        try:
            with contextlib.suppress(SuspendedError):  # No fault: reported failed, the request is recomputed.
                good = self._load(job)
        except BaseException as error:
            self._note("a load failed", error)
        finally:  # A job that is never reported would hang its request.
            self._report_load(job, good)

    def _report_load(self, job: LoadJob, good: bool) -> None:
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
            with self._on_tensors():
                ok = self._paged.load(client, namespace, job.block_ids[at], job.slots[at], job.words[at])
            if not np.all(ok) or not self._verifier.intact(client, namespace, job.slots[at], job.words[at]):
                return False
        return job.req_id not in self._cancelled

    def _run_store(self, job: StoreJob, fits: bool) -> None:
        committed, refusals = 0, set()
        try:
            committed = self._store(job, fits)
        except RefusedError as refused:
            refusals.add(Refusal(job.session, job.namespace, str(refused)))
        except BaseException as error:
            self._note("a store failed", error)
        finally:  # A job that is never reported would keep its blocks pinned.
            closed = self._membership.take_closed()
            with self._condition:
                self._ended.stored[job.job_id] = committed
                self._ended.refusals |= refusals
                self._ended.closed |= closed

    def _store(self, job: StoreJob, fits: bool) -> int:
        """Blocks committed. Whatever is not committed is aborted, now or as soon as the server can be told."""
        try:
            client, namespace = self._membership.for_store(job.session, job.namespace)
            self._owed.pay(client, job.session)
            if fits and not self._is_void(job) and self._copied(client, namespace, job) and not self._is_void(job):
                sums = self._verifier.sums(client, namespace, job.slots)
                return client.commit(job.lease_id, job.slots, job.words, sums, timeout_ms=_COMMIT_MS)
            client.abort(job.lease_id, job.slots, job.words, timeout_ms=_COMMIT_MS)
            return 0
        except LeftError:
            raise  # The server closes the parts of a session that was left.
        except BaseException:
            self._owed.add(job)
            raise

    def _copied(self, client: Any, namespace: Any, job: StoreJob) -> bool:
        try:
            for at in self._pieces(len(job.block_ids)):
                with self._on_tensors():
                    self._paged.store(
                        client, namespace, job.block_ids[at], job.slots[at], server_epoch=job.session.server_epoch
                    )
        except SuspendedError:
            return False
        except BaseException as error:
            self._note("a copy failed", error)
            return False
        return True

    @contextlib.contextmanager
    def _on_tensors(self) -> Iterator[None]:
        """A copy that `suspend` waits for; none begins while the cache has no memory."""
        with self._condition:
            if self._suspended:
                raise SuspendedError("the engine sleeps, its KV cache has no memory")
            self._copying = True
        try:
            yield
        finally:
            with self._condition:
                self._copying = False
                self._condition.notify_all()

    def _is_void(self, job: StoreJob) -> bool:
        return job.job_id < self._void_below

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
            # Of a server that is away the scheduler's side warns, once for the engine.
            level = logging.INFO if isinstance(error, _SERVER_AWAY) else logging.WARNING
            self._logger.log(level, "kvmp: %s (%s); logged once for this cause", cause, error)
