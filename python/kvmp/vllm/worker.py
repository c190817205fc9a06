"""The worker side: describes its part at start, queues each step's copies, reports what has ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from kvmp.config import ConnectorConfig
from kvmp.vllm import cache_groups, compat
from kvmp.vllm.copier import Copier
from kvmp.vllm.jobs import Ended
from kvmp.vllm.joined import Membership
from kvmp.vllm.metadata import LoadJob, PartMeta, Share, StepMeta, StoreJob, WorkerReport
from kvmp.vllm.spec import canonical, layout_digest
from kvmp.vllm.stats import KvmpStats


class WorkerSide:
    """One rank's worker, from registration to shutdown. It makes no contact before its scheduler has a session."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, options: ConnectorConfig, logger: logging.Logger, stats: KvmpStats
    ):
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._options = options
        self._logger = logger
        self._stats = stats
        self._off = cache_groups.unsupported_cache(kv_cache_config) or ""
        self._paged: Any = None
        self._rank = 0
        self._share: Share | None = None
        self._layout_json = "{}"
        self._copier: Copier | None = None
        self._connect: Any = None
        self._new_loads: list[LoadJob] = []
        self._new_stores: list[StoreJob] = []
        self._doomed: list[LoadJob] = []
        self._unreported = WorkerReport()
        self._asleep = False
        self._failed_blocks: set[int] = set()

    def use_connect(self, connect: Any) -> None:
        """Uses what stands in for `kvmp.Client.connect`."""
        self._connect = connect

    # Start and end.

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Describes this rank's cache; a cache that cannot be copied switches kvmp off for the engine."""
        if self._off:
            return
        devices = {tensor.device.type for tensor in kv_caches.values()}
        self._off = compat.unsupported_device(devices) or ""
        if devices != {"cpu"}:
            self._off = self._off or compat.unsupported_sleep(self._vllm_config) or ""
        if self._off:
            return
        from kvmp.paged import PagedKV

        pp_rank, tp_rank = compat.rank_in_engine()
        self._rank = pp_rank * self._vllm_config.parallel_config.tensor_parallel_size + tp_rank
        self._paged = PagedKV(kv_caches, num_blocks=self._kv_cache_config.num_blocks)
        layout = canonical({**self._paged.layout(), "layers": self._layer_facts()})
        # A large model's layout would overflow the namespace's entry in the segment: its digest stands there.
        self._layout_json = canonical(layout_digest(layout))
        self._logger.debug("kvmp: layout of rank %d, of digest %s: %s", self._rank, self._layout_json, layout)
        self._say_how_bytes_move()

    def _say_how_bytes_move(self) -> None:
        paged = self._paged
        if paged.lanes is not None:
            self._logger.info(
                "kvmp: rank %d: %d blocks of %d bytes in %d runs each on %s (layout %s), copied by %s",
                self._rank,
                paged.num_blocks,
                paged.block_bytes,
                paged.runs,
                paged.device,
                getattr(self._kv_cache_config, "kv_cache_layout", None),
                {"gather": "a kernel", "batch": "batched DMA", "single": "DMA, one call a run"}[paged.lanes.way],
            )

    def registration_failed(self) -> None:
        """Registration raised: this rank cannot take part."""
        self._off = self._off or "a worker could not describe its KV cache; its log says why"

    def part(self) -> PartMeta:
        """What the scheduler side must know of this part."""
        if self._off or self._paged is None:
            return PartMeta(rank=self._rank, off=self._off or "a worker has no KV cache")
        equal = compat.equal_tp_ranks(self._vllm_config, self._kv_cache_config)
        block_bytes, facts = self._paged.block_bytes, self._worker_facts()
        return PartMeta(self._rank, block_bytes, self._layout_json, facts, equal_ranks=equal)

    def _specs(self) -> list[Any]:
        return list(compat.layer_specs(self._kv_cache_config.kv_cache_groups[0].kv_cache_spec))

    def _layer_facts(self) -> list[str]:
        return sorted({repr(spec) for spec in self._specs()})

    def _worker_facts(self) -> str:
        packings = {compat.kernel_packing(self._vllm_config, spec) for spec in self._specs()}
        layout = getattr(self._kv_cache_config, "kv_cache_layout", None)
        return json.dumps({"packing": sorted(packings), "kv_cache_layout": str(layout)}, sort_keys=True)

    def sleep(self) -> None:
        """Keeps every copy off the cache, whose memory goes; its addresses stay."""
        self._asleep = True
        if self._copier is not None:
            self._copier.suspend()

    def wake(self) -> None:
        """Copies again: vLLM has put memory behind the same addresses, so nothing is described anew."""
        self._asleep = False
        if self._copier is not None:
            self._copier.resume()

    def shutdown(self) -> None:
        """Lets the copy under way end, then leaves the server."""
        if self._copier is not None:
            self._copier.stop()

    # Steps.

    def bind(self, meta: StepMeta) -> None:
        """Takes this step's work; it starts when the step's hooks say so."""
        if meta.shares:
            self._share = meta.shares[self._rank]
        self._new_loads.extend(meta.loads)
        if self._share is not None and self._share.writes:
            self._new_stores.extend(meta.stores)
        if meta.session is not None and self._paged is not None:
            self._running_copier().follow(meta.session, meta.namespace)
        if self._copier is not None and (meta.cancelled_loads or meta.void_below):
            self._copier.cancel(meta.cancelled_loads, meta.void_below)
        if self._paged is not None and self._paged.lanes is not None:
            # Before this step's forward is given to the GPU: copies go behind what came before it, not behind that. A
            # store's blocks were filled by an earlier step, for its grant was asked for in one. (But for the draft
            # layers of a multi-module MTP, filled again a step later; a wrong draft costs time, not tokens.)
            self.start_loads()
            self.start_stores()

    def _event(self) -> Any:
        return None if self._paged is None else self._paged.record_event()

    def start_loads(self) -> None:
        """Queues this step's loads."""
        after = None
        while self._new_loads:
            job = self._new_loads.pop(0)
            try:
                after = after or self._event()
                self._running_copier().load(job, after)
            except BaseException:
                # vLLM waits for this load: it is reported failed with the next results.
                self._doomed.append(job)
                raise

    def start_stores(self) -> None:
        """Queues this step's stores: the forward that wrote their blocks has ended, or was given to the GPU before.

        On a GPU that is at the bind; on a CPU after the forward, which they would slow down.
        """
        after = None
        while self._new_stores:
            job = self._new_stores.pop(0)
            try:
                after = after or self._event()
                self._running_copier().store(job, after)
            except BaseException:
                self._unreported = self._unreported.aggregate(self._stored({job.job_id: 0}))
                raise

    def _stored(self, committed: Mapping[int, int]) -> WorkerReport:
        """A report of stores that have ended, with the blocks committed of each."""
        part = self._share.part if self._share is not None else 0
        return WorkerReport({job_id: {part: blocks} for job_id, blocks in committed.items()})

    def _running_copier(self) -> Copier:
        if self._copier is None:
            if self._share is None:
                raise RuntimeError("a copy is wanted, but the scheduler side has not said which part this rank has")
            membership = Membership(
                self._share.part,
                self._layout_json,
                self._options.socket_dir,
                writes=self._share.writes,
                dma=self._paged.lanes is not None,
                connect=self._connect,
            )
            verify = self._options.verify == "always"
            self._copier = Copier(self._paged, membership, self._logger, self._stats, verify=verify)
            if self._asleep:
                self._copier.suspend()
        return self._copier

    def transfers(self) -> tuple[set[str], set[str]]:
        """(requests whose load has ended, those of them that failed) since the last call; keeps the stores' ends."""
        ended = self._copier.take_ended() if self._copier is not None else Ended()
        doomed, self._doomed = self._doomed, []
        for job in doomed:
            ended.loaded.add(job.req_id)
            ended.failed.add(job.req_id)
            ended.failed_blocks.update(job.block_ids.tolist())
        self._failed_blocks |= ended.failed_blocks
        stores = self._stored(ended.stored).stores
        report = WorkerReport(stores, frozenset(ended.refusals), frozenset(ended.closed))
        if report:
            self._unreported = self._unreported.aggregate(report)
        return ended.loaded, ended.failed

    def take_failed_blocks(self) -> set[int]:
        """Engine blocks of loads that failed since the last call."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def take_report(self) -> WorkerReport | None:
        """What the scheduler side must hear since the last call, None if nothing."""
        report, self._unreported = self._unreported, WorkerReport()
        return report or None
