"""The connector's own counters, which vLLM sends to its front end with each step's statistics."""

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from kvmp.vllm.stats import KvmpStats

totals = KvmpStats()
"""Everything since the start."""


class ConnectorCounters(StatLoggerBase):
    """Adds up what the steps bring, as a listener of vLLM's."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        pass

    def record(self, scheduler_stats: Any, *_args: Any, **_options: Any) -> None:
        if counted := scheduler_stats and scheduler_stats.kv_connector_stats:
            # A MultiConnector counts for each of its connectors.
            totals.aggregate(KvmpStats(counted.get("KvmpConnector", counted)))

    def log_engine_initialized(self) -> None:
        pass
