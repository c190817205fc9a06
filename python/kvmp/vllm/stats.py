"""What the connector counts, in the class by which vLLM merges, logs and forwards them."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

# Every counter and what it counts.
COUNTERS = {
    "attached": "1 while a server serves this engine, 0 while it works without its cache",
    "lookups": "lookups sent",
    "lookup_timeouts": "lookups given up after kvmp.timeout_ms",
    "lookup_wait_us": "how long requests were held back for an answer, microseconds; others ran meanwhile",
    "longest_hold_us": "the latest that a request was told to wait on, from when vLLM first asked for it, microseconds",
    "hit_tokens": "tokens that answers offered",
    "loaded_tokens": "tokens loaded",
    "loaded_blocks": "blocks loaded",
    "failed_load_blocks": "blocks whose load failed, computed anew by the engine",
    "damaged_blocks": "blocks found to be other bytes than were stored, with kvmp.verify",
    "stored_blocks": "blocks committed by every rank",
    "failed_store_blocks": "blocks granted, but aborted or lost on the way",
    "refused_store_blocks": "blocks for which the server had no room or no parent, or that it did not admit",
    "reserve_timeouts": "stores given up after kvmp.timeout_ms",
    "busy": "lookups and stores put off to the next step, as too many requests were open",
    "errors": "failures turned into a miss or into blocks that were not stored",
    "step_us": "time spent in the connector by the engine's threads, microseconds",
    "longest_call_us": "the longest of these calls, microseconds",
    "longest_step_wait_us": "what these calls waited in a step at most, microseconds; bounded by kvmp.timeout_ms",
}
MAXIMA = frozenset({"longest_call_us", "longest_hold_us", "longest_step_wait_us"})
GAUGES = frozenset({"attached"})
_NO_NEWS = frozenset({"step_us", "longest_call_us"})


class KvmpStats(KVConnectorStats):
    """Plain integers by name; both sides and all ranks use this one class."""

    def __init__(self, data: dict[str, Any] | None = None):
        super().__init__(data=dict(data or {}))

    def add(self, name: str, amount: int = 1) -> None:
        """Counts `amount` more of `name`."""
        if amount:
            self.data[name] = self.data.get(name, 0) + int(amount)

    def raise_to(self, name: str, value: int) -> None:
        """Keeps the largest value seen of `name`."""
        if value > self.data.get(name, 0):
            self.data[name] = int(value)

    def set_to(self, name: str, value: int) -> None:
        """Keeps the last value of `name`."""
        self.data[name] = int(value)

    def reset(self) -> None:
        """Starts a new interval."""
        self.data = {}

    def take(self) -> KvmpStats | None:
        """What was counted since the last call, None if it is no news."""
        if self.is_empty():
            return None
        taken, self.data = KvmpStats(self.data), {}
        return taken

    def aggregate(self, other: KVConnectorStats) -> KvmpStats:
        """Adds another side's or rank's counters to these."""
        for name, value in other.data.items():
            if name in GAUGES:
                self.set_to(name, value)
            elif name in MAXIMA:
                self.raise_to(name, value)
            else:
                self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counters for vLLM's log line."""
        return {name: self.data[name] for name in COUNTERS if name in self.data}

    def is_empty(self) -> bool:
        """Whether nothing was counted. Time alone is no news: it would log a line for every idle interval.

        That there is no server is news for as long as it lasts: an engine without its cache must not look healthy.
        """
        return not any(name not in _NO_NEWS and (name, value) != ("attached", 1) for name, value in self.data.items())
