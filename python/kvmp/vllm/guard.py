"""The one place through which vLLM enters kvmp: nothing raises into the engine.

An entry point that fails is counted, logged once for each cause, and answered with "no hit" or "not stored".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from kvmp.vllm.stats import KvmpStats

T = TypeVar("T")

ENDS_THE_PROCESS = (KeyboardInterrupt, SystemExit)


class Guard:
    """Runs entry points, and keeps what they cost and how they failed."""

    def __init__(self, logger: logging.Logger, stats: KvmpStats):
        self._logger = logger
        self._stats = stats
        self._seen: set[tuple[str, type]] = set()

    def run(self, entry: str, call: Callable[[], T], fallback: T, rescue: Callable[[], T] | None = None) -> T:
        """`call()`, or, when it raises, `rescue()`, or `fallback` when there is none or it raises too."""
        begun = time.perf_counter_ns()
        try:
            return call()
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:  # The engine must outlive any fault of its cache, a panic in Rust included.
            self._report(entry, error)
        finally:
            self._account(begun)
        if rescue is None:
            return fallback
        try:
            return rescue()
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            self._report(f"{entry} (rescue)", error)
            return fallback

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
