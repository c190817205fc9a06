"""The connector's own counters, which vLLM sends to its front end with each step's statistics."""

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

totals: dict[str, int] = {}
"""Sums since the start, under `kvmp_` and the counter's name."""


class ConnectorCounters(StatLoggerBase):
    """Adds up what the steps bring, as a listener of vLLM's."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        pass

    def record(self, scheduler_stats: Any, *_args: Any, **_options: Any) -> None:
        for name, amount in ((scheduler_stats and scheduler_stats.kv_connector_stats) or {}).items():
            totals[f"kvmp_{name}"] = totals.get(f"kvmp_{name}", 0) + amount

    def log_engine_initialized(self) -> None:
        pass
