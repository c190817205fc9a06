"""The one place through which vLLM enters kvmp: nothing raises into the engine.

An entry point that fails is counted, logged once for each cause, and answered with "no hit" or "not stored".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.step_waits import StepWaits

T = TypeVar("T")

ENDS_THE_PROCESS = (KeyboardInterrupt, SystemExit)


def harmless(entry: str, call: Callable[[], T], fallback: Callable[[], T], logger: logging.Logger) -> T:
    """`call()`, or `fallback()` when it raises: for what vLLM asks of the class, where nothing is counted."""
    try:
        return call()
    except ENDS_THE_PROCESS:
        raise
    except BaseException as error:
        logger.warning("kvmp: %s failed (%s: %s)", entry, type(error).__name__, error)
        return fallback()


class Guard:
    """Runs entry points, and keeps what they cost and how they failed."""

    def __init__(self, logger: logging.Logger, stats: KvmpStats, waits: StepWaits):
        self._logger = logger
        self._stats = stats
        self._waits = waits
        self._seen: set[tuple[str, type]] = set()

    def begin_step(self) -> None:
        """The engine's next step begins."""
        self._waits.begin_step()

    def run(self, entry: str, call: Callable[[], T], fallback: T, rescue: Callable[[], T] | None = None) -> T:
        """`call()`, or, when it raises, `rescue()`, or `fallback` when there is none or it raises too."""
        begun = time.perf_counter_ns()
        self._waits.enter()
        try:
            done, result = self._try(entry, call)
            if not done and rescue is not None:
                done, result = self._try(f"{entry} (rescue)", rescue)
            return result if done else fallback
        finally:
            self._waits.leave()
            self._account(begun)

    def _try(self, entry: str, call: Callable[[], T]) -> tuple[bool, Any]:
        try:
            return True, call()
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:  # The engine must outlive any fault of its cache, a panic in Rust included.
            self._report(entry, error)
            return False, None

    def _account(self, begun_ns: int) -> None:
        spent_us = (time.perf_counter_ns() - begun_ns) // 1000
        self._stats.add("step_us", spent_us)
        self._stats.raise_to("longest_call_us", spent_us)

    def _report(self, entry: str, error: BaseException) -> None:
        self._stats.add("errors")
        cause = (entry, type(error))
        if cause in self._seen:
            return
        self._seen.add(cause)
        self._logger.warning(
            "kvmp: %s failed (%s: %s); the engine goes on as if the cache had no answer. Logged once for this cause.",
            entry,
            type(error).__name__,
            error,
            exc_info=error,
        )
