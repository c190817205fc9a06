"""Stores: blocks are put up as they fill, granted slots, copied part by part, and pinned on the engine all that time.

put up{pinned} -> reserved -> granted: handed to the workers -> every part reported -> unpinned
                           -> not granted, or given up after the bound: unpinned
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmp import errors
from kvmp.client import Answer
from kvmp.config import ConnectorConfig
from kvmp.vllm.guard import ENDS_THE_PROCESS
from kvmp.vllm.link import Link, OpenNamespace
from kvmp.vllm.metadata import NamespaceRef, Refusal, SessionRef, StoreJob, WorkerReport
from kvmp.vllm.pins import Pins
from kvmp.vllm.request_state import RequestState, hash_array
from kvmp.vllm.stats import KvmpStats

# Blocks put up in one message; a server takes 16,384, and the rest follows with the next step.
_PUT_UP_MOST = 8192
_BREAKS_THE_CHAIN = [int(code) for code in (Answer.NO_PARENT, Answer.NO_SPACE, Answer.NOT_ADMITTED, Answer.WARMING)]


@dataclass(frozen=True, eq=False)
class _Reserving:
    """Blocks put up and not yet answered for."""

    state: RequestState
    namespace: OpenNamespace
    block_ids: list[int]
    pending: Any
    at: float


@dataclass(eq=False)
class _Copying:
    """Blocks handed to the workers."""

    block_ids: list[int]
    committed: dict[int, int] = field(default_factory=dict)


class Stores:
    """Puts blocks up for storing and sees the stores end."""

    def __init__(
        self,
        link: Link,
        options: ConnectorConfig,
        stats: KvmpStats,
        logger: logging.Logger,
        parts: int,
        clock=time.monotonic,
    ):
        """
        Args:
            parts: parts of a slot, each of which one rank stores and reports.
        """
        self.pins = Pins()
        self._link = link
        self._options = options
        self._stats = stats
        self._logger = logger
        self._parts = parts
        self._clock = clock
        self._reserving: deque[_Reserving] = deque()
        self._granted: list[StoreJob] = []
        self._copying: dict[int, _Copying] = {}
        self._next_job = 1
        self._void_below = 0
        self._refused: set[tuple[SessionRef, NamespaceRef]] = set()

    @property
    def void_below(self) -> int:
        """Stores with a smaller job id must not be committed any more."""
        return self._void_below

    @property
    def busy(self) -> bool:
        """Whether any block is put up, granted or being copied."""
        return bool(self._reserving or self._copying)

    def open_for(self, state: RequestState) -> bool:
        """Whether the request's next blocks may be stored: there is a namespace, and its chain there is whole."""
        namespace = self._link.namespace(state.adapter)
        if namespace is None or (namespace.session.ref, namespace.ref) in self._refused:
            return False
        state.move_to(namespace)
        return not state.store_closed

    def put_up(self, state: RequestState, full_blocks: int, table: list[int]) -> None:
        """Puts up the request's blocks from its watermark to `full_blocks`, as far as there is room for pins.

        Args:
            full_blocks: blocks that are filled when this step's forward has ended, and have a hash.
            table: all engine blocks of the request, which `open_for` has let pass in this step.
        """
        first = state.stored_blocks
        block_ids = table[first : min(full_blocks, first + self.pins.room, first + _PUT_UP_MOST)]
        null = 0 in block_ids
        if null:
            block_ids = block_ids[: block_ids.index(0)]
        if block_ids and not self._reserve(state, first, block_ids):
            return
        state.stored_blocks = first + len(block_ids)
        # The null block holds nobody's KV; what lies behind it has no parent.
        state.store_closed = state.store_closed or null

    def _reserve(self, state: RequestState, first: int, block_ids: list[int]) -> bool:
        """False when there is no room for one more request now: the blocks are put up with the next step."""
        namespace = state.namespace
        hashes = state.request.block_hashes
        parent = hash_array([hashes[first - 1]]).tobytes() if first else None
        wanted = hash_array(hashes[first : first + len(block_ids)])
        self.pins.pin(block_ids)
        try:
            pending = namespace.session.client.submit_reserve(
                namespace.handle, wanted, first_block=first, parent=parent
            )
        except BaseException as error:
            self.pins.unpin(block_ids)
            if isinstance(error, errors.Busy):
                self._stats.add("busy")
                return False
            state.store_closed = True
            self._link.mark_lost(namespace.session)
            if not isinstance(error, errors.ServerLost):
                raise
            # No fault to report here: the link warns of it, once.
            self._stats.add("errors")
            return False
        self._reserving.append(_Reserving(state, namespace, block_ids, pending, self._clock()))
        return True

    def harvest(self) -> None:
        """Takes in what was granted since the last step; never waits."""
        for _ in range(len(self._reserving)):
            reserving = self._reserving.popleft()
            lease, ended = self._answer(reserving)
            if lease is not None:
                self._accept(reserving, lease)
            elif ended:
                self._give_up(reserving)
            else:
                self._reserving.append(reserving)

    def take_granted(self) -> tuple[StoreJob, ...]:
        """The stores to hand over with this step's metadata."""
        granted, self._granted = tuple(self._granted), []
        return granted

    def _answer(self, reserving: _Reserving) -> tuple[Any, bool]:
        """The write lease, or None and whether there is no more hope of one."""
        if not self._link.up:
            return None, True
        try:
            lease = reserving.pending.poll()
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            self._logger.debug("kvmp: a reservation was lost: %s", error)
            self._stats.add("errors")
            self._link.mark_lost(reserving.namespace.session)
            return None, True
        if lease is not None or self._clock() - reserving.at < self._options.timeout_s:
            return lease, False
        self._stats.add("reserve_timeouts")
        self._link.mark_lost(reserving.namespace.session)
        return None, True

    def _give_up(self, reserving: _Reserving) -> None:
        self.pins.unpin(reserving.block_ids)
        self._close(reserving)
        self._stats.add("refused_store_blocks", len(reserving.block_ids))
        reserving.pending.abandon()

    def _close(self, reserving: _Reserving) -> None:
        if reserving.state.namespace is reserving.namespace:
            reserving.state.store_closed = True

    def _accept(self, reserving: _Reserving, lease: Any) -> None:
        kept: list[int] = []
        try:
            answers = np.asarray(lease.answers)
            granted = np.flatnonzero(answers == Answer.GRANTED)
            self._count_refused(reserving, answers)
            if granted.size:
                self._hand_over(reserving, lease, granted)
                kept = [reserving.block_ids[i] for i in granted]
            else:
                lease.cancel()
        finally:
            self.pins.unpin(_without(reserving.block_ids, kept))

    def _count_refused(self, reserving: _Reserving, answers: np.ndarray) -> None:
        refused = int(np.isin(answers, _BREAKS_THE_CHAIN).sum())
        if refused:
            self._close(reserving)
            self._stats.add("refused_store_blocks", refused)

    def _hand_over(self, reserving: _Reserving, lease: Any, granted: np.ndarray) -> None:
        block_ids = np.array(reserving.block_ids, np.int64)[granted]
        slots, words = np.array(lease.slots[granted]), np.array(lease.words[granted])
        session, namespace = reserving.namespace.session.ref, reserving.namespace.ref
        job = StoreJob(self._next_job, lease.lease_id, block_ids, slots, words, session, namespace)
        lease.handed_over()
        self._next_job += 1
        self._copying[job.job_id] = _Copying(block_ids.tolist())
        self._granted.append(job)

    def reported(self, report: WorkerReport) -> None:
        """Takes in what workers report; a store has ended when every part has."""
        for job_id, parts in report.stores.items():
            copying = self._copying.get(job_id)
            if copying is not None:
                copying.committed.update(parts)
                if len(copying.committed) >= self._parts:
                    self._end(job_id, copying)
        for refusal in report.refusals:
            self._take_refusal(refusal)

    def _take_refusal(self, refusal: Refusal) -> None:
        """Storing is off in this namespace for as long as this session lasts."""
        key = (refusal.session, refusal.namespace)
        if key not in self._refused:
            self._refused = {known for known in self._refused if known[0] == refusal.session} | {key}
            self._logger.warning("kvmp: storing is off in this session: the server refuses a worker: %s", refusal.text)

    def _end(self, job_id: int, copying: _Copying) -> None:
        del self._copying[job_id]
        self.pins.unpin(copying.block_ids)
        stored = min(copying.committed.values())
        self._stats.add("stored_blocks", stored)
        self._stats.add("failed_store_blocks", len(copying.block_ids) - stored)

    def drop(self, invalid: Set[int]) -> None:
        """These engine blocks hold no KV: what was put up with one of them is not stored."""
        for _ in range(len(self._reserving)):
            reserving = self._reserving.popleft()
            if invalid.isdisjoint(reserving.block_ids):
                self._reserving.append(reserving)
            else:
                self._give_up(reserving)

    def void(self) -> None:
        """A reset: nothing begun before it may be found later."""
        self._void_below = self._next_job
        while self._reserving:
            self._give_up(self._reserving.popleft())


def _without(block_ids: list[int], kept: list[int]) -> list[int]:
    gone = set(kept)
    return [block_id for block_id in block_ids if block_id not in gone]
