"""Jobs whose copies were begun: each is settled once its copies have ended, exactly once.

begun -> copies ended -> checked -> done | failed          a load
begun -> copies ended -> committed | aborted               a store

Until its copies have ended, a job's part of the slots is open and its engine blocks are touched. Used by the copy
thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmp import _kvmp
from kvmp.vllm.jobs import Jobs, Queued
from kvmp.vllm.joined import LeftError, Membership, RefusedError
from kvmp.vllm.metadata import LoadJob, Refusal, StoreJob
from kvmp.vllm.owed import Owed
from kvmp.vllm.verify import Verifier

# Tests only: sleeps this long after each block, so that a test can act while a copy is part done. Milliseconds.
SLOW_COPY_VARIABLE = "KVMP_TEST_SLOW_COPY_MS"
_COMMIT_MS = 1000


class SuspendedError(Exception):
    """No copy may touch the tensors now."""


@dataclass(eq=False)
class _Flight:
    job: Any
    client: Any = None
    namespace: Any = None
    copies: list[Any] = field(default_factory=list)
    # Not to be counted as done, whatever its copies say.
    failed: bool = False
    # Why its copies, or the rest of them, could not be begun.
    error: BaseException | None = None
    # It may still be touching the engine's blocks.
    on_tensors: bool = False

    def has_ended(self) -> bool:
        return all(copy.has_ended() for copy in self.copies)

    def loaded_well(self) -> bool:
        return not self.failed and all(bool(np.all(copy.good())) for copy in self.copies)


class Flights:
    """Begins copies and settles jobs."""

    def __init__(
        self,
        paged: Any,
        membership: Membership,
        owed: Owed,
        jobs: Jobs,
        verifier: Verifier,
        bell: _kvmp.Bell,
        note: Callable[[str, BaseException], None],
    ):
        """
        Args:
            bell: rung when a copy has ended.
            note: told what failed, and of what.
        """
        self._paged = paged
        self._membership = membership
        self._owed = owed
        self._jobs = jobs
        self._verifier = verifier
        self._bell = bell
        self._note = note
        self._slow_s = float(os.environ.get(SLOW_COPY_VARIABLE, 0)) / 1000
        self._flights: list[_Flight] = []
        # Copies may touch the tensors, or must not; and how many do.
        self._tensors = threading.Condition()
        self._suspended = False
        self._touching = 0

    def __len__(self) -> int:
        return len(self._flights)

    # Any thread.

    def suspend(self) -> None:
        """Has no copy touch a tensor from now on; returns when those under way have ended."""
        with self._tensors:
            self._suspended = True
            self._bell.ring()
            self._tensors.wait_for(lambda: not self._touching)

    def resume(self) -> None:
        """Copies again."""
        with self._tensors:
            self._suspended = False

    # Begin.

    def begin(self, queued: Queued) -> None:
        """Begins the copies of a job."""
        begin = self._begin_load if isinstance(queued.job, LoadJob) else self._begin_store
        begin(_Flight(queued.job), queued)

    def _begin_load(self, flight: _Flight, queued: Queued) -> None:
        flight.failed = True  # Until its last copy was begun.
        try:
            with contextlib.suppress(SuspendedError):  # No fault: reported failed, the request is recomputed.
                flight.failed = not self._load_begun(flight, queued)
        except BaseException as error:
            self._note("a load failed", error)
        finally:
            self._flights.append(flight)

    def _load_begun(self, flight: _Flight, queued: Queued) -> bool:
        job = flight.job
        if job.session is None or job.namespace is None:
            return False
        flight.client, flight.namespace = self._membership.for_load(job.session, job.namespace)
        for at in self._pieces(len(job.block_ids)):
            if self._jobs.is_cancelled(job):
                return False
            where = (flight.client, flight.namespace, job.block_ids[at], job.slots[at], job.words[at])
            with self._on_tensors(flight):
                flight.copies.append(self._paged.begin_load(*where, after=_handle(queued.after), bell=self._bell))
        return True

    def _begin_store(self, flight: _Flight, queued: Queued) -> None:
        job = flight.job
        flight.failed = True  # Until its last copy was begun.
        try:
            flight.client, flight.namespace = self._membership.for_store(job.session, job.namespace)
            self._owed.pay(flight.client, job.session)
            if queued.fits and not self._jobs.is_void(job):
                flight.failed = not self._store_begun(flight, queued)
        except BaseException as error:
            flight.error = error
        finally:  # Even so: copies that were begun must end before anything is said of the job.
            self._flights.append(flight)

    def _store_begun(self, flight: _Flight, queued: Queued) -> bool:
        job, epoch = flight.job, flight.job.session.server_epoch
        try:
            for at in self._pieces(len(job.block_ids)):
                where = (flight.client, flight.namespace, job.block_ids[at], job.slots[at])
                after = _handle(queued.after)
                with self._on_tensors(flight):
                    copy = self._paged.begin_store(*where, server_epoch=epoch, after=after, bell=self._bell)
                    flight.copies.append(copy)
        except SuspendedError:
            return False
        except BaseException as error:
            self._note("a copy failed", error)
            return False
        return True

    @contextlib.contextmanager
    def _on_tensors(self, flight: _Flight) -> Iterator[None]:
        """A copy that `suspend` waits for, until its flight has ended; none begins while the cache has no memory."""
        with self._tensors:
            if self._suspended:
                raise SuspendedError("the engine sleeps, its KV cache has no memory")
            if not flight.on_tensors:
                flight.on_tensors = True
                self._touching += 1
        yield

    def _pieces(self, blocks: int) -> Iterator[slice]:
        if not self._slow_s:
            yield slice(0, blocks)
            return
        for at in range(blocks):
            yield slice(at, at + 1)
            time.sleep(self._slow_s)

    # End.

    def settle_ended(self) -> None:
        """Settles the jobs whose copies have ended, and lets go of arenas that no job will need."""
        ended = [flight for flight in self._flights if self._has_ended(flight)]
        for flight in ended:  # First: `suspend` waits for no answer of the server.
            self._off_tensors(flight)
        for flight in ended:
            self._flights.remove(flight)
            settle = self._settle_load if isinstance(flight.job, LoadJob) else self._settle_store
            try:
                settle(flight)
            finally:  # Whoever keeps the flight, an error's frames say, keeps no holder entry locked with it.
                flight.copies = []
        self._forget_dropped()

    def _forget_dropped(self) -> None:
        for client in self._membership.take_dropped():
            try:
                self._paged.forget(client)
            except BaseException as error:
                self._note("letting go of an arena failed", error)

    def finish(self) -> None:
        """Waits for every copy under way, and settles its job."""
        for flight in self._flights:
            _await_end(flight)
        self.settle_ended()

    def _has_ended(self, flight: _Flight) -> bool:
        try:
            return flight.has_ended()
        except BaseException as error:  # The GPU failed, which ends every copy; after any other fault one may go on.
            _await_end(flight)
            flight.failed, flight.copies = True, []
            self._note("a copy failed", error)
            return True

    def _off_tensors(self, flight: _Flight) -> None:
        with self._tensors:
            if flight.on_tensors:
                flight.on_tensors = False
                self._touching -= 1
                self._tensors.notify_all()

    def _settle_load(self, flight: _Flight) -> None:
        good = False
        try:
            good = self._loaded_well(flight)
        except BaseException as error:
            self._note("a load failed", error)
        finally:
            self._jobs.load_ended(flight.job, good)

    def _loaded_well(self, flight: _Flight) -> bool:
        job: LoadJob = flight.job
        if not flight.loaded_well():
            return False
        intact = self._verifier.intact(flight.client, flight.namespace, job.slots, job.words)
        return intact and not self._jobs.is_cancelled(job)

    def _settle_store(self, flight: _Flight) -> None:
        if flight.error is not None:
            self._store_failed(flight, flight.error)
            return
        try:
            committed = self._close_parts(flight)
        except BaseException as error:
            self._store_failed(flight, error)
        else:
            self._store_ended(flight.job, committed)

    def _close_parts(self, flight: _Flight) -> int:
        """Blocks committed; whatever is not is aborted."""
        job: StoreJob = flight.job
        if self._membership.has_left(job.session):
            return 0  # The server closes the parts of a session that was left.
        if not flight.failed and not self._jobs.is_void(job):
            sums = self._verifier.sums(flight.client, flight.namespace, job.slots)
            if not self._jobs.is_void(job):  # Sums take a while.
                return flight.client.commit(job.lease_id, job.slots, job.words, sums, timeout_ms=_COMMIT_MS)
        flight.client.abort(job.lease_id, job.slots, job.words, timeout_ms=_COMMIT_MS)
        return 0

    def _store_failed(self, flight: _Flight, error: BaseException) -> None:
        """Whatever was not committed is aborted as soon as the server can be told."""
        job: StoreJob = flight.job
        try:
            if not isinstance(error, LeftError):
                self._owed.add(job)
            if isinstance(error, RefusedError):
                self._jobs.refused(Refusal(job.session, job.namespace, str(error)))
            else:
                self._note("a store failed", error)
        finally:
            self._store_ended(job, 0)

    def _store_ended(self, job: StoreJob, committed: int) -> None:
        try:
            self._jobs.closed(self._membership.take_closed())
        finally:
            self._jobs.store_ended(job, committed)


def _await_end(flight: _Flight) -> None:
    """Sleeps until its copies have ended."""
    for copy in flight.copies:
        with contextlib.suppress(BaseException):  # It has ended; why it failed is seen when it is settled.
            copy.wait()


def _handle(event: Any) -> int | None:
    return None if event is None else event.cuda_event
