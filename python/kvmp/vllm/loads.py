"""Loads: each is one job, reported by every rank exactly once; the read lease lives until then.

planned -> sent with the step's metadata -> ended on every rank (vLLM counts) -> lease released.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmp.vllm.metadata import LoadJob
from kvmp.vllm.request_state import RequestState
from kvmp.vllm.stats import KvmpStats

_NO_SLOTS = np.zeros(0, np.uint32)
_NO_WORDS = np.zeros(0, np.uint64)


@dataclass(frozen=True, eq=False)
class _Load:
    state: RequestState
    lease: Any
    block_ids: np.ndarray
    tokens: int
    # Blocks that some rank has said it did not load; with several ranks that comes before the load's end (vLLM 0.29).
    invalid: set[int] = field(default_factory=set)


class Loads:
    """Plans loads and sees them end."""

    def __init__(self, block_tokens: int, stats: KvmpStats):
        self._block_tokens = block_tokens
        self._stats = stats
        self._active: dict[str, _Load] = {}
        self._planned: list[LoadJob] = []
        self._cancelled: set[str] = set()

    def __len__(self) -> int:
        return len(self._active)

    def plan(self, state: RequestState, table: list[int], tokens: int) -> None:
        """Plans the load of `tokens` tokens behind those resident when vLLM last asked.

        Args:
            table: all engine blocks of the request.

        A load that does not begin and end with a block is reported failed.
        """
        if state.local_tokens % self._block_tokens or tokens % self._block_tokens:
            # Of a part of a block vLLM would take the rest for loaded.
            self.plan_failed(state, table, tokens)
            return
        first = state.local_tokens // self._block_tokens
        block_ids = np.array(table[first : first + tokens // self._block_tokens], np.int64)
        lease = state.answer.lease if state.answer is not None else None
        job = self._job(state, lease, first, block_ids)
        state.answer = None
        self._begin(_Load(state, lease, block_ids, tokens), job)

    def plan_failed(self, state: RequestState, table: list[int], tokens: int) -> None:
        """Plans a load that is only to be reported failed: vLLM waits for a report of it."""
        state.forget_lookup()
        block_ids = np.array(table, np.int64)
        job = LoadJob(state.request.request_id, block_ids, _NO_SLOTS, _NO_WORDS)
        self._begin(_Load(state, None, block_ids, tokens), job)

    def _begin(self, load: _Load, job: LoadJob) -> None:
        load.state.loading = True
        self._active[job.req_id] = load
        self._planned.append(job)

    def _job(self, state: RequestState, lease: Any, first: int, block_ids: np.ndarray) -> LoadJob:
        req_id, namespace = state.request.request_id, state.namespace
        if lease is None or namespace is None:
            return LoadJob(req_id, block_ids, _NO_SLOTS, _NO_WORDS)
        at = slice(first - lease.first_block(0), first - lease.first_block(0) + len(block_ids))
        slots, words = np.array(lease.slots(0)[at]), np.array(lease.words(0)[at])
        if len(slots) != len(block_ids):
            return LoadJob(req_id, block_ids, _NO_SLOTS, _NO_WORDS)
        return LoadJob(req_id, block_ids, slots, words, namespace.session.ref, namespace.ref)

    def take_planned(self) -> tuple[LoadJob, ...]:
        """The loads to send with this step's metadata."""
        planned, self._planned = tuple(self._planned), []
        return planned

    def take_cancelled(self) -> frozenset[str]:
        """The loads that nobody wants any more, to send with this step's metadata."""
        cancelled, self._cancelled = frozenset(self._cancelled), set()
        return cancelled

    def cancel(self, req_id: str) -> None:
        """The request is gone; its blocks stay until every rank has reported the load, so it is cut short."""
        if req_id in self._active:
            self._cancelled.add(req_id)

    def cancel_all(self) -> None:
        """What is being loaded is void: a reset."""
        self._cancelled.update(self._active)

    def note_invalid(self, blocks: Iterable[int]) -> None:
        """A rank did not load these blocks (vLLM 0.29): kept until every rank has reported the load they are of."""
        bad = set(blocks)
        for load in self._active.values():
            load.invalid.update(bad.intersection(load.block_ids.tolist()))

    def ended(self, finished: Iterable[str], failed: Iterable[str]) -> None:
        """Every rank has reported these requests' loads.

        Args:
            failed: those of them that failed (vLLM 0.30+).
        """
        failed = set(failed)
        for req_id in finished:
            load = self._active.pop(req_id, None)
            if load is None:
                continue
            self._cancelled.discard(req_id)
            self._settle(load, req_id in failed or bool(load.invalid))

    def _settle(self, load: _Load, bad: bool) -> None:
        load.state.loading = False
        if bad:
            load.state.failed = True
            # What was hit is not all there: computed anew, it is put up for storing from the first block on.
            load.state.stored_blocks, load.state.store_closed = 0, False
            self._stats.add("failed_load_blocks", load.tokens // self._block_tokens)
        else:
            self._stats.add("loaded_tokens", load.tokens)
            self._stats.add("loaded_blocks", load.tokens // self._block_tokens)
        if load.lease is not None:
            load.lease.release()
