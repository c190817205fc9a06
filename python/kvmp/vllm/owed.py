"""Stores given up while the server could not be told: owed{lease} -> aborted, or dropped with its session."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

from kvmp import errors
from kvmp.vllm.joined import Membership
from kvmp.vllm.metadata import SessionRef, StoreJob


class Owed:
    """Parts that stay open in the server until it hears that nobody writes them; used by the copy thread only."""

    def __init__(self, membership: Membership, timeout_ms: int):
        self._membership = membership
        self._timeout_ms = timeout_ms
        self._jobs: deque[StoreJob] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: StoreJob) -> None:
        """Has the job's parts aborted as soon as the server can be told; aborting a closed part does no harm."""
        if not self._membership.has_left(job.session):
            self._jobs.append(job)

    def drop_left(self) -> None:
        """Forgets what was owed in sessions that were left: their parts are closed with them."""
        if any(self._membership.has_left(job.session) for job in self._jobs):
            self._jobs = deque(job for job in self._jobs if not self._membership.has_left(job.session))

    def pay(self, client: Any, session: SessionRef) -> None:
        """Aborts what is owed in this session; what the server could not be told stays owed.

        Raises:
            KvmpError: the server cannot be told now.
        """
        for job in [job for job in self._jobs if job.session == session]:
            # Where the server knows of no such lease, nothing of it is open.
            with contextlib.suppress(errors.LeaseError, errors.InvalidInput):
                client.abort(job.lease_id, job.slots, job.words, timeout_ms=self._timeout_ms)
            self._jobs.remove(job)
