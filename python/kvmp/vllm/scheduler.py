"""The scheduler side: asks for hits, plans loads and stores, sees them end. Nothing waits but look-ups, a moment."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from kvmp.config import ConnectorConfig
from kvmp.vllm import cache_groups, compat
from kvmp.vllm.link import Adapter, Link
from kvmp.vllm.loads import Loads
from kvmp.vllm.lookups import Lookups
from kvmp.vllm.metadata import PartMeta, Share, StepMeta, WorkerReport
from kvmp.vllm.request_state import RequestState
from kvmp.vllm.shares import share_parts
from kvmp.vllm.spec import SpecRefusedError, build_spec, ordered_parts
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.stores import Stores
from kvmp.vllm.sync_loads import SyncLoads


class SchedulerSide:
    """One engine's scheduler, from the workers' hand-shake to shutdown."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, options: ConnectorConfig, logger: logging.Logger, stats: KvmpStats
    ):
        self._vllm_config = vllm_config
        self._options = options
        self._logger = logger
        self._stats = stats
        self._off: str = ""
        self._pool: Any = None
        self._block_tokens = 0
        self._requests: dict[str, RequestState] = {}
        self._sync_loads = SyncLoads(vllm_config.max_concurrent_batches)
        self._shares: tuple[Share, ...] = ()
        self._link: Link | None = None
        self._lookups: Lookups | None = None
        self._stores: Stores | None = None
        self._loads: Loads | None = None
        reason = cache_groups.unsupported_cache(kv_cache_config) or cache_groups.unsupported_engine(vllm_config)
        if reason:
            self.switch_off(reason)
            return
        self._block_tokens = compat.hash_block_tokens(vllm_config, kv_cache_config)
        self._loads = Loads(self._block_tokens, stats)
        # A load that fails is recomputed, never an error of the request; vLLM reads this after our constructor.
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"

    # Start and end.

    def switch_off(self, reason: str) -> None:
        """Never serves this engine, which runs on without a cache; one line says why."""
        if not self._off:
            self._off = reason
            self._logger.warning("kvmp is switched off: %s", reason)

    def set_parts(self, parts: Mapping[tuple[int, int], PartMeta], connect: Any = None) -> None:
        """Takes the workers' parts and begins to attach in the background.

        Args:
            parts: what the workers gave, by (pipeline rank, tensor-parallel rank).
            connect: what stands in for `kvmp.Client.connect`.
        """
        if self._off or self._link is not None:
            return
        try:
            ordered = ordered_parts(parts, self._vllm_config)
        except SpecRefusedError as refused:
            self.switch_off(str(refused))
            return
        self._shares = share_parts(ordered, self._vllm_config.parallel_config.tensor_parallel_size)
        written = tuple(rank for rank, share in zip(ordered, self._shares, strict=True) if share.writes)
        self._link = Link(
            self._options,
            lambda: build_spec(self._vllm_config, self._block_tokens, written, verify=self._options.verify == "always"),
            self._logger,
            readers=len(written) < len(ordered),
            connect=connect,
            switch_off=self.switch_off,
        )
        self._say_shared(len(written))
        self._lookups = Lookups(self._link, self._options, self._block_tokens, self._stats)
        self._stores = Stores(self._link, self._options, self._stats, self._logger, len(written))
        if self._pool is not None:
            self._stores.pins.bind(self._pool)
        self._link.start()

    def _say_shared(self, parts: int) -> None:
        ranks = len(self._shares)
        if parts < ranks:
            self._logger.info("kvmp: %d ranks share %d parts of a block: their KV is equal", ranks, parts)

    def bind_pool(self, pool: Any) -> None:
        """Uses the engine's block pool to pin what is being stored."""
        self._pool = pool
        if self._stores is not None:
            self._stores.pins.bind(pool)

    def shutdown(self) -> None:
        """Gives up every lease and leaves the server."""
        for state in self._requests.values():
            state.forget_lookup()
        self._requests.clear()
        if self._link is not None:
            self._link.stop()

    @property
    def attached(self) -> bool:
        """Whether a server serves this engine now."""
        return self._link is not None and self._link.up and not self._off

    # Requests.

    def _state(self, request: Any) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None:
            adapter, cacheable = _identity(request)
            state = RequestState(request, adapter, cacheable)
            self._requests[request.request_id] = state
        return state

    def arrived(self, request: Any) -> None:
        """Sends the request's lookup."""
        if self._lookups is None or self._off:
            return
        state = self._state(request)
        if state.cacheable and not _skips_reading(request):
            self._lookups.send(state)

    def matched_tokens(self, request: Any, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load behind the `local_tokens` resident ones; (None, False) while the answer is under way."""
        if self._lookups is None or self._off:
            return 0, False
        state = self._state(request)
        state.local_tokens = local_tokens
        # vLLM asks only for requests it computes from the first token on: nothing of before a reset is left.
        state.tainted = False
        if not state.cacheable or state.failed or state.loading or _skips_reading(request):
            return 0, False
        hit = self._lookups.hit_tokens(state)
        if hit is None:
            return None, False
        wanted = min(hit, request.num_tokens // self._block_tokens * self._block_tokens) - local_tokens
        return (wanted, True) if wanted > 0 else (0, False)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """The request was admitted: plans its load, or lets go of a lease it does not use."""
        state = self._requests.get(request.request_id)
        if external_tokens > 0:
            self._loads.plan(self._state(request), blocks.get_block_ids()[0], external_tokens)
        elif state is not None and not state.loading:
            answer, state.answer = state.answer, None
            if answer is not None and answer.lease is not None:
                answer.lease.release()

    def allocated_in_vain(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Planning failed, but vLLM waits for the load's end: has it reported failed."""
        if external_tokens > 0:
            self._loads.plan_failed(self._state(request), blocks.get_block_ids()[0], external_tokens)

    def finished(self, request: Any) -> None:
        """The request has ended; a load under way is cut short but still reported."""
        state = self._requests.pop(request.request_id, None)
        if state is not None:
            state.forget_lookup()
        if self._loads is not None:
            self._loads.cancel(request.request_id)

    # Steps.

    def step_meta(self, scheduler_output: Any) -> StepMeta:
        """This step's work: loads planned, stores granted; puts up what this step fills."""
        if self._loads is None:
            return StepMeta()
        self._sync_loads.begin_step(scheduler_output)
        if self._lookups is not None:
            self._lookups.begin_step()
        if self._stores is not None:
            self._stores.harvest()
            self._put_up_filled(scheduler_output)
        return self.planned_meta()

    def planned_meta(self) -> StepMeta:
        """What is planned so far: also what a step must carry when planning more failed, for vLLM waits for loads."""
        if self._loads is None:
            return StepMeta()
        namespace = self._link.namespace() if self._link is not None else None
        return StepMeta(
            session=self._link.session if self._link is not None else None,
            namespace=namespace.ref if namespace is not None else None,
            loads=self._loads.take_planned(),
            stores=self._stores.take_granted() if self._stores is not None else (),
            void_below=self._stores.void_below if self._stores is not None else 0,
            cancelled_loads=self._loads.take_cancelled(),
            shares=self._shares,
        )

    def _put_up_filled(self, scheduler_output: Any) -> None:
        if self._off or not self._link.up:
            return
        for req_id, tokens in _tokens_after_step(scheduler_output):
            state = self._requests.get(req_id)
            if state is None or not state.cacheable or state.tainted or not self._stores.open_for(state):
                continue
            if self._sync_loads.may_have_failed(req_id):
                continue
            full = self._full_blocks(state.request, tokens)
            if full > state.stored_blocks:
                table = compat.block_ids(scheduler_output, req_id)
                if table is not None:
                    self._stores.put_up(state, full, table)

    def _full_blocks(self, request: Any, tokens: int) -> int:
        full = min(tokens // self._block_tokens, len(request.block_hashes))
        if not self._options.save_decode:
            full = min(full, request.num_prompt_tokens // self._block_tokens)
        return full

    def output(self, connector_output: Any) -> None:
        """Takes in what the workers report."""
        if self._loads is not None:
            if connector_output.invalid_block_ids:
                self._loads.note_invalid(connector_output.invalid_block_ids)
                if self._stores is not None:
                    self._stores.drop(connector_output.invalid_block_ids)
            if connector_output.finished_recving:
                failed = getattr(connector_output, "failed_recving", None) or ()
                self._loads.ended(connector_output.finished_recving, failed)
        report = connector_output.kv_connector_worker_meta
        if self._stores is not None and isinstance(report, WorkerReport):
            self._link.renew(report.closed)
            self._stores.reported(report)

    @property
    def busy(self) -> bool:
        """Whether anything is put up, pinned or loading, so that the engine must go on stepping."""
        return bool((self._stores is not None and self._stores.busy) or self._loads)

    def can_free_blocks(self) -> bool:
        """Whether a store's end would give the engine blocks back."""
        return self._stores is not None and bool(len(self._stores.pins)) and self._stores.pins.holds_last_reference()

    def reset(self) -> bool:
        """Forgets all that was stored: goes on under a fresh salt, what is under way is void."""
        if self._link is None:
            return True
        self._link.new_salt()
        self._stores.void()
        self._loads.cancel_all()
        for state in self._requests.values():
            state.forget_lookup()
            state.namespace, state.tainted = None, True
        return True


def _skips_reading(request: Any) -> bool:
    return bool(getattr(request, "skip_reading_prefix_cache", False))


def _identity(request: Any) -> tuple[Adapter | None, bool]:
    """The request's adapter, and whether its hashes and weights say all there is to know of its KV."""
    if getattr(request, "resumable", False) and not compat.streaming_hashes_exact():
        return None, False
    lora = request.lora_request
    if lora is None:
        return None, True
    if getattr(lora, "load_inplace", False):
        return None, False
    return Adapter(lora.lora_int_id, lora.lora_name, lora.lora_path), True


def _tokens_after_step(scheduler_output: Any) -> Iterator[tuple[str, int]]:
    """(request, tokens whose KV is written when this step's forward has ended), new, running and resumed ones alike."""
    scheduled = scheduler_output.num_scheduled_tokens
    for new in scheduler_output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens + scheduled.get(new.req_id, 0)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield req_id, computed + scheduled.get(req_id, 0)
