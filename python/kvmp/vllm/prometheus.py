"""The connector's counters among vLLM's Prometheus metrics, as ``vllm:kvmp_NAME``, each with vLLM's labels.

Under a MultiConnector vLLM's front end ends with an error when a connector counts anything and has no such class.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.logger import init_logger

from kvmp.vllm.guard import harmless
from kvmp.vllm.stats import COUNTERS, GAUGES, MAXIMA

logger = init_logger("vllm.kvmp")


class KvmpPromMetrics(KVConnectorPromMetrics):
    """A counter for each sum, a gauge for each last or largest value. What fails is logged, and is an end of them."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any):
        """Args are vLLM's: its classes for metrics, its labels, and their values by engine index."""
        self._largest: dict[tuple[int, str], int] = {}
        self._metrics: dict[tuple[int, str], Any] = {}
        given = (vllm_config, metric_types, labelnames, per_engine_labelvalues)
        harmless("build_prom_metrics", lambda: self._register(*given), lambda: None, logger)

    def _register(self, vllm_config: Any, metric_types: Any, labelnames: list[str], values_by_engine: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, values_by_engine)
        for name, what in COUNTERS.items():
            kwargs = {"name": f"vllm:kvmp_{name}", "documentation": what, "labelnames": labelnames}
            if name in GAUGES | MAXIMA:
                metric = metric_types[Gauge](**kwargs, multiprocess_mode="mostrecent")
            else:
                metric = metric_types[Counter](**kwargs)
            for engine, values in values_by_engine.items():
                self._metrics[engine, name] = metric.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes in what one side of an engine counted since it last told."""
        harmless("observe", lambda: self._observe(transfer_stats_data, engine_idx), self._metrics.clear, logger)

    def _observe(self, counted: dict[str, Any], engine: int) -> None:
        for name, value in counted.items():
            metric = self._metrics.get((engine, name))
            if metric is None:
                continue
            if name in GAUGES:
                metric.set(value)
            elif name in MAXIMA:
                self._largest[engine, name] = max(value, self._largest.get((engine, name), 0))
                metric.set(self._largest[engine, name])
            else:
                metric.inc(value)
