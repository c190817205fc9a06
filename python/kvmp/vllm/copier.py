"""The worker's copy thread: begins copies, loads before stores, and settles each job when its copies have ended.

On the CPU a copy has ended when it was begun. On a GPU many are under way at once, one stream a direction, and the
thread sleeps until one ends or a job comes. In between it leaves sessions that its scheduler has left or whose server
is gone, joins the scheduler's new one, and pays what is owed; a copy under way keeps its session's holder entry locked.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

from kvmp import _kvmp, errors
from kvmp.vllm.flights import Flights
from kvmp.vllm.jobs import Ended, Jobs, store_limit
from kvmp.vllm.joined import Membership, NotJoinedError, RefusedError
from kvmp.vllm.metadata import LoadJob, NamespaceRef, Refusal, SessionRef, StoreJob
from kvmp.vllm.owed import Owed
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.verify import Verifier

_ABORT_MS = 1000
# A GPU that fails rings no bell: copies under way are looked at so often at least. Seconds.
_LOOK_S = 0.02
# An idle worker sees a hang-up at the latest this much later. Seconds.
_WATCH_S = 0.2
_STOP_S = 5.0
_SERVER_AWAY = (NotJoinedError, errors.ServerLost, errors.BoundExceeded)
# After a fault of its own the thread goes on this much later. Seconds.
_PAUSE_S = 0.05


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
        self._bell = _kvmp.Bell()
        limit = store_limit(paged.num_blocks * paged.block_bytes)
        self._jobs = Jobs(paged.block_bytes, limit, self._bell)
        self._owed = Owed(membership, _ABORT_MS)
        verifier = Verifier(verify, logger, stats)
        self._flights = Flights(paged, membership, self._owed, self._jobs, verifier, self._bell, self._note)
        self._stopping = False
        self._seen: set[str] = set()
        self._slow_said = False
        self._thread = threading.Thread(target=self._run, name="kvmp-copy", daemon=True)
        self._thread.start()

    # The engine's thread.

    def load(self, job: LoadJob, after: Any = None) -> None:
        """Queues a load.

        Args:
            after: `torch.cuda.Event` behind which it goes, None for none.
        """
        self._jobs.add_load(job, after)

    def store(self, job: StoreJob, after: Any = None) -> None:
        """Queues a store, or its abort when too many bytes are on their way already.

        Args:
            after: `torch.cuda.Event` of the work that wrote its blocks, None where that has ended.
        """
        self._jobs.add_store(job, after)

    def follow(self, session: SessionRef, namespace: NamespaceRef | None) -> None:
        """The scheduler's session now, and its namespace of plain requests."""
        self._jobs.follow(session, namespace)

    def cancel(self, req_ids: frozenset[str], void_below: int) -> None:
        """Cuts these loads short, and has no store with a smaller job id committed."""
        self._jobs.cancel(req_ids, void_below)

    def take_ended(self) -> Ended:
        """What has ended since the last call."""
        return self._jobs.take_ended()

    def suspend(self) -> None:
        """Touches no tensor from now on: their memory is about to go. Returns when the copies under way have ended.

        That wait has no bound: a copy that goes on would touch memory that is not there; it is a few jobs' bytes.
        Until `resume`, loads fail and stores are aborted.
        """
        self._flights.suspend()

    def resume(self) -> None:
        """Copies again: the tensors have memory at the addresses they had."""
        self._flights.resume()

    def stop(self) -> None:
        """Ends the thread after the copies under way."""
        self._stopping = True
        self._bell.ring()
        self._thread.join(_STOP_S)

    # The copy thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except BaseException as error:  # The thread ends with its engine, not before: jobs would hang.
                with contextlib.suppress(BaseException):
                    self._note("the copy thread failed", error)
                self._bell.wait(_PAUSE_S)
        with contextlib.suppress(BaseException):
            self._flights.finish()
        self._membership.close()

    def _turn(self) -> None:
        """What has ended is settled, what is there to do is begun."""
        self._await_work()
        if self._stopping:
            return
        try:
            self._tend()
        except BaseException as error:  # The jobs are run all the same, each by its own luck.
            self._note("looking after the session failed", error)
        self._flights.settle_ended()
        if queued := self._jobs.take():
            self._flights.begin(queued)
            self._flights.settle_ended()

    def _await_work(self) -> None:
        """Returns when there is some, or after a while in which a copy may have ended, or a server gone."""
        if self._jobs.waiting():
            return
        watchful = self._membership.watchful or self._owed
        self._bell.wait(_LOOK_S if self._flights else _WATCH_S if watchful else None)

    def _tend(self) -> None:
        news = self._jobs.take_news()
        try:
            self._membership.watch()
            if news is not None:
                self._join_early(*news)
            self._owed.drop_left()
            self._pay_owed()
            self._say_slow()
        finally:
            self._jobs.closed(self._membership.take_closed())

    def _join_early(self, session: SessionRef, namespace: NamespaceRef | None) -> None:
        self._membership.follow(session)
        try:
            self._membership.join(session, namespace)
        except RefusedError as refused:
            self._jobs.refused(Refusal(session, namespace, str(refused)))
        except NotJoinedError as error:
            # The first job tries again, and says so if it fails.
            self._logger.debug("kvmp: not joined yet: %s", error)
        else:
            self._paged.prepare(self._membership.client)

    def _pay_owed(self) -> None:
        session = self._membership.session
        if self._owed and session is not None and not self._membership.lost:
            self._owed.pay(self._membership.client, session)

    def _say_slow(self) -> None:
        if not self._slow_said and (trouble := self._paged.trouble()):
            self._slow_said = True
            self._logger.warning(
                "kvmp: CUDA did not take all of the arena (%s): copies of the rest are slower. In a container, let it "
                "lock memory (docker run --ulimit memlock=-1)",
                trouble,
            )

    def _note(self, what: str, error: BaseException) -> None:
        self._stats.add("errors")
        cause = f"{what}: {type(error).__name__}"
        if cause not in self._seen:
            self._seen.add(cause)
            # Of a server that is away the scheduler's side warns, once for the engine.
            level = logging.INFO if isinstance(error, _SERVER_AWAY) else logging.WARNING
            self._logger.log(level, "kvmp: %s (%s); logged once for this cause", cause, error)
