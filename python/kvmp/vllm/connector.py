"""`KvmpConnector`: vLLM's way into kvmp. Each method hands over to one of the two sides, through the guard."""

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.logger import init_logger

from kvmp.config import ConnectorConfig
from kvmp.vllm import cache_groups, compat, plugin, unreachable, version
from kvmp.vllm.guard import Guard, harmless
from kvmp.vllm.metadata import PartMeta, StepMeta, WorkerReport
from kvmp.vllm.prometheus import KvmpPromMetrics
from kvmp.vllm.scheduler import SchedulerSide
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.step_waits import StepWaits
from kvmp.vllm.worker import WorkerSide

logger: logging.Logger = init_logger("vllm.kvmp")


# `SupportsHMA`, though it serves engines of one cache group: without it those of none, or of several that cannot be
# united, end at their start or with their first request, instead of working without kvmp.
class KvmpConnector(KVConnectorBase_V1, SupportsHMA):
    """A best-effort KV cache beside vLLM, shared by every engine of the node and outliving each of them.

    Configure it with ``kv_connector="KvmpConnector"`` and ``kv_role="kv_both"``; where vLLM's plugins are switched off
    also with ``kv_connector_module_path="kvmp.vllm.connector"``. `kvmp.config.ConnectorConfig` has what may be set. It
    never raises into the engine: what fails becomes "no hit" or "not stored".
    """

    # Where hits come from, for vLLM's metrics (0.32+).
    _cache_hit_source = compat.host_hit_source()

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        """
        Raises:
            ValueError: a setting is unknown or wrong; a start with it would not do what the user asked for.
            ConnectError: `kvmp.on_unreachable` is "fail" and no server serves us.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = ConnectorConfig.read(self._kv_transfer_config.kv_connector_extra_config)
        unreachable.demand_server(self._options)
        self._stats = KvmpStats()
        self._guard = Guard(logger, self._stats, StepWaits(self._options.timeout_ms, self._stats))
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        make = self._make_scheduler if role == KVConnectorRole.SCHEDULER else self._make_worker
        self._guard.run("start", make, None)

    def _make_scheduler(self) -> None:
        if warning := version.unsupported_once():
            logger.warning(warning)
        side = SchedulerSide(self._vllm_config, self._kv_cache_config, self._options, logger, self._stats)
        if self._kv_transfer_config.kv_role != "kv_both":
            side.switch_off(f"kv_role is {self._kv_transfer_config.kv_role!r}; set it to 'kv_both'")
        outer = compat.parent_transfer_config()
        if outer is not None and outer.kv_load_failure_policy != "recompute":
            logger.warning(
                "kvmp: a request whose load fails will end with an error: kv_load_failure_policy of the MultiConnector "
                "is %r; set it to 'recompute', beside its kv_connector",
                outer.kv_load_failure_policy,
            )
        self._scheduler = side

    def _make_worker(self) -> None:
        cache_groups.follow(self._vllm_config, self._kv_cache_config)
        self._worker = WorkerSide(self._vllm_config, self._kv_cache_config, self._options, logger, self._stats)

    # Both sides.

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped store is a future miss, no more: nothing is recomputed for it."""
        return False

    def shutdown(self) -> None:
        """Lets the copy under way end and leaves the server."""
        for side in (self._scheduler, self._worker):
            if side is not None:
                self._guard.run("shutdown", side.shutdown, None)

    def get_kv_connector_stats(self) -> KvmpStats | None:
        """What this side counted since the last call."""
        return self._guard.run("get_kv_connector_stats", self._take_stats, None)

    def _take_stats(self) -> KvmpStats | None:
        if self._role == KVConnectorRole.SCHEDULER:
            self._stats.set_to("attached", self._scheduler is not None and self._scheduler.attached)
        return self._stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvmpStats:
        """The counters of another process as an object again; none at all rather than an error in the front end."""
        return harmless("build_kv_connector_stats", lambda: KvmpStats(data), KvmpStats, logger)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KvmpPromMetrics:
        """The counters as Prometheus metrics, in the front end's process."""
        return KvmpPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """On a GPU blocks outermost, so that a block is one run of bytes over all layers; on the CPU no wish.

        A wish: a backend that cannot have it keeps its own layout, and kvmp copies what it finds. None beside other
        connectors, or where kvmp cannot serve. Asked before layers are grouped, so they are united here too.
        """

        def wish() -> str | None:
            return compat.wished_layout(vllm_config) if cache_groups.unite(vllm_config, logger) else None

        return harmless("get_required_kvcache_layout", wish, lambda: None, logger)

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Describes this rank's cache."""
        if (side := self._worker) is not None:
            self._guard.run(
                "register_kv_caches", lambda: side.register(kv_caches), None, rescue=side.registration_failed
            )

    def unregister_kv_caches(self) -> None:
        """Keeps off the cache's memory, which goes while the engine sleeps (vLLM 0.33)."""
        if (side := self._worker) is not None:
            self._guard.run("unregister_kv_caches", side.sleep, None)

    def restore_kv_caches(self) -> None:
        """Uses the cache's memory again; it is where it was (vLLM 0.33)."""
        if (side := self._worker) is not None:
            self._guard.run("restore_kv_caches", side.wake, None)

    def get_handshake_metadata(self) -> PartMeta | None:
        """This rank's part, for the scheduler side."""
        if (side := self._worker) is None:
            return None
        return self._guard.run("get_handshake_metadata", side.part, None)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Takes this step's work."""
        super().bind_connector_metadata(connector_metadata)
        self._guard.begin_step()
        if (side := self._worker) is not None and isinstance(connector_metadata, StepMeta):
            self._guard.run("bind_connector_metadata", lambda: side.bind(connector_metadata), None)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Queues this step's loads where the bind has not."""
        if (side := self._worker) is not None:
            self._guard.run("start_load_kv", side.start_loads, None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are asynchronous, and a request is scheduled after its load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks are stored, after the forward that filled them."""

    def wait_for_save(self) -> None:
        """Queues this step's stores where the bind has not; does not wait, for their blocks are pinned."""
        if (side := self._worker) is not None:
            self._guard.run("wait_for_save", side.start_stores, None)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Loads that have ended (vLLM 0.30 and later)."""
        loaded, failed = self._transfers()
        return compat.TransferResults(finished_sending=set(), finished_recving=loaded, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Loads that have ended (vLLM 0.29)."""
        loaded, _ = self._transfers()
        return None, loaded or None

    def _transfers(self) -> tuple[set[str], set[str]]:
        if (side := self._worker) is None:
            return set(), set()
        # vLLM before 0.31 skips wait_for_save on steps without a forward: stores that ride one begin here.
        self._guard.run("get_finished", side.start_stores, None)
        return self._guard.run("get_finished", side.transfers, (set(), set()))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed loads, where vLLM knows no failed request (0.29)."""
        if (side := self._worker) is None:
            return set()
        blocks = self._guard.run("get_block_ids_with_load_errors", side.take_failed_blocks, set())
        return blocks if compat.TransferResults is None else set()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        """Stores that have ended."""
        if (side := self._worker) is None:
            return None
        return self._guard.run("build_connector_worker_meta", side.take_report, None)

    # Scheduler side.

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Takes every rank's part and begins to attach."""
        if (side := self._scheduler) is not None:
            self._guard.run("set_xfer_handshake_metadata", lambda: side.set_parts(metadata), None)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The same for an engine without pipeline stages."""
        if (side := self._scheduler) is not None:
            self._guard.run(
                "set_xfer_handshake_metadata",
                lambda: side.set_parts({(0, tp_rank): part for tp_rank, part in metadata.items()}),
                None,
            )

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Uses the engine's block pool to pin what is being stored."""
        if (side := self._scheduler) is not None:
            self._guard.run("bind_gpu_block_pool", lambda: side.bind_pool(gpu_block_pool), None)

    def on_new_request(self, request: Any) -> None:
        """Sends the request's lookup."""
        if (side := self._scheduler) is not None:
            self._guard.run("on_new_request", lambda: side.arrived(request), None)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load behind those resident; None while the answer is under way within its bound."""
        if (side := self._scheduler) is None:
            return 0, False
        return self._guard.run(
            "get_num_new_matched_tokens", lambda: side.matched_tokens(request, num_computed_tokens), (0, False)
        )

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans the load of an admitted request."""
        if (side := self._scheduler) is not None:
            self._guard.run(
                "update_state_after_alloc",
                lambda: side.allocated(request, blocks, num_external_tokens),
                None,
                rescue=lambda: side.allocated_in_vain(request, blocks, num_external_tokens),
            )

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        """This step's work for the workers."""
        if (side := self._scheduler) is None:
            return StepMeta()
        meta = self._guard.run(
            "build_connector_meta", lambda: side.step_meta(scheduler_output), StepMeta(), rescue=side.planned_meta
        )
        self._guard.begin_step()
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        """Takes in what the workers report."""
        if (side := self._scheduler) is not None:
            self._guard.run("update_connector_output", lambda: side.output(connector_output), None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Lets the engine free the blocks at once: what is being stored is pinned."""
        if (side := self._scheduler) is not None:
            self._guard.run("request_finished", lambda: side.finished(request), None)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, whatever the number of groups."""
        return self.request_finished(request, [])

    def has_pending_push_work(self) -> bool:
        """Whether anything is reserved, pinned or loading, so that the engine goes on stepping until it has ended."""
        if (side := self._scheduler) is None:
            return False
        return self._guard.run("has_pending_push_work", lambda: side.busy, False)

    def has_pending_block_frees(self) -> bool:
        """Whether waiting for a store is better than preempting a request."""
        if (side := self._scheduler) is None:
            return False
        return self._guard.run("has_pending_block_frees", side.can_free_blocks, False)

    def reset_cache(self) -> bool:
        """Forgets what was stored; a server that is away does not make a reset fail."""
        if (side := self._scheduler) is not None:
            self._guard.run("reset_cache", side.reset, None)
        return True


harmless("naming the connector", plugin.name_connector, lambda: None, logger)
