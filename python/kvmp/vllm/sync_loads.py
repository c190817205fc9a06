"""Requests whose KV another connector of a MultiConnector may have failed to load: known when the step's output is in.

admitted beside a synchronous load -> held back until that step's output was taken in -> put up
"""

from __future__ import annotations

from typing import Any


class SyncLoads:
    """Which requests must not be put up yet.

    That a load within a step's forward has failed is said by that step's output only, and other batches may have been
    planned before that comes. Until then neither the request that the load is for nor one that has found its blocks in
    the engine's cache is known to have been computed from right KV.
    """

    def __init__(self, batches: int):
        """
        Args:
            batches: steps that may be under way at once (`VllmConfig.max_concurrent_batches`).
        """
        self._batches = batches
        self._step = 0
        self._known_at = 0
        self._held: dict[str, int] = {}

    def begin_step(self, scheduler_output: Any) -> None:
        """Takes note of a step, also of those in which nothing can be put up."""
        self._step += 1
        if scheduler_output.has_sync_kv_loads:
            self._known_at = self._step + self._batches
        self._held = {req_id: known_at for req_id, known_at in self._held.items() if known_at > self._step}
        if self._known_at > self._step:
            self._held.update(dict.fromkeys(_admitted(scheduler_output), self._step + self._batches))

    def may_have_failed(self, req_id: str) -> bool:
        """Whether the outputs that would say so are still to come."""
        return req_id in self._held


def _admitted(scheduler_output: Any) -> list[str]:
    new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
    return [*new, *scheduler_output.scheduled_cached_reqs.resumed_req_ids]
