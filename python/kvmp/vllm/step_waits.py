"""One budget for all that kvmp's calls on an engine's thread wait in a step: `kvmp.timeout_ms`.

A step goes on the scheduler side from one `build_connector_meta` to the next, in a worker from one bind to the next.

No hook that a step calls waits, but for the moment that `lookups` gives a question that has just been sent: whatever
else can wait is done by the threads of `link` and `copier`. So what is counted here stays far below the bound. It is
cut to it all the same, for it is the promise. (Outside of steps a sleep waits for the copy under way, and a shutdown
for those threads.) What a request is held back for its answer is no wait of a call, for others run meanwhile;
`lookups` bounds and counts it.
"""

from __future__ import annotations

from kvmp.client import limit_waits
from kvmp.vllm.stats import KvmpStats


class StepWaits:
    """What this side's calls on the engine's thread have waited in the current step."""

    def __init__(self, timeout_ms: int, stats: KvmpStats):
        self._budget_us = timeout_ms * 1000
        self._stats = stats
        self._waited_us = 0

    def begin_step(self) -> None:
        """Gives the calls from here on a budget of their own."""
        self._waited_us = 0

    def enter(self) -> None:
        """An entry point begins: its calls wait at most what is left of the step's budget."""
        limit_waits(max(0, self._budget_us - self._waited_us))

    def leave(self) -> None:
        """It has ended: counts what its calls have waited."""
        self._waited_us += limit_waits(None)
        self._stats.raise_to("longest_step_wait_us", self._waited_us)
