"""Where vLLM 0.29 to 0.33 differ: the only file that probes for what a version has; `version.py` says which it is."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1 import kv_cache_interface

from kvmp.vllm import version

# Where nothing says which it is, nothing is relied on that the oldest lacks.
VERSION = version.number() or version.WRITTEN_FOR[0]

# 0.30+ reports a failed load by request; 0.29 knows failed blocks only.
TransferResults = getattr(base, "KVConnectorTransferResults", None)

# How models' configurations name their number of KV heads, or what it follows from.
_KV_HEADS = (
    "key_value_heads",
    "kv_heads",
    "kv_n_heads",
    "head_kv",
    "heads_in_group",
    "query_group_num",
    "attention_groups",
)

# A block of so many tokens is one of a kernel's too, whatever the attention backend.
_NEVER_CUT_TOKENS = 16

# Where a MultiConnector makes its children, and where it asks them for a layout.
_MULTI_CONNECTOR_CALLS = ("MultiConnector.__init__", "MultiConnector.get_required_kvcache_layout")

# Where the engine core asks for a layout, and then groups the layers.
_GROUPING_CALL = "EngineCore._initialize_kv_caches"


def host_hit_source() -> Any:
    """The label of hits in host memory (0.32+), None before."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.HOST


def streaming_hashes_exact() -> bool:
    """Whether a streaming session's hash list is cut when a sampled token is dropped (0.32+)."""
    return VERSION >= (0, 32)


def block_ids(scheduler_output: Any, req_id: str) -> list[int] | None:
    """The engine blocks of a request scheduled in this step, null blocks as 0; None when the step does not have it."""
    state = scheduler_output.kv_connector_block_state
    if state is None:
        return None
    lookup = getattr(state, "get_block_ids", None) or state.block_ids.get
    groups = lookup(req_id)
    return None if groups is None else groups[0]


def hash_block_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens that one block hash covers."""
    if tokens := getattr(kv_cache_config, "hash_block_size", None):
        return tokens
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    return resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1]


def layer_specs(group_spec: Any) -> Iterable[Any]:
    """The layer specs behind a group's spec."""
    if isinstance(group_spec, kv_cache_interface.UniformTypeKVCacheSpecs):
        return group_spec.kv_cache_specs.values()
    return (group_spec,)


def all_layer_specs(kv_cache_config: Any) -> list[Any]:
    """The layer specs of every group."""
    return [spec for group in kv_cache_config.kv_cache_groups for spec in layer_specs(group.kv_cache_spec)]


def unsupported_group(group: Any) -> str | None:
    """Why vLLM lets nobody move this group's blocks, None where it does."""
    if not getattr(group, "enable_kv_transfer", True):
        return "the engine's KV-cache group must not be transferred (enable_kv_transfer is off)"
    if getattr(group, "host_resident", False):
        return "the engine's KV-cache group lies in host memory of its own"
    return None


def _is_cuda() -> bool:
    import torch
    from vllm.platforms import current_platform

    # ROCm calls its devices "cuda" too.
    return current_platform.device_type == "cuda" and torch.version.cuda is not None


def unsupported_device(types: set[str]) -> str | None:
    """Why a KV cache on these kinds of device is beyond the connector, None when it is not."""
    if types == {"cpu"} or (types == {"cuda"} and _is_cuda()):
        return None
    where = " and ".join(sorted(types)) or "no device"
    return f"the KV cache is on {where}; kvmp copies tensors of the CPU or of one CUDA device"


def unsupported_sleep(vllm_config: Any) -> str | None:
    """Why copies beside the engine's work could meet a cache whose memory is gone, None where they cannot.

    A sleep frees it; before 0.33 no hook says so, and a copy under way would end the process with an illegal address.
    """
    if VERSION >= (0, 33) or not getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return None
    return "vLLM before 0.33 frees the KV cache in a sleep without a word; leave enable_sleep_mode off to use kvmp"


def unsupported_sleep_on_gpu(vllm_config: Any) -> str | None:
    """The same, before it is known where the cache lies."""
    return unsupported_sleep(vllm_config) if _is_cuda() else None


def wished_layout(vllm_config: Any) -> str | None:
    """The memory order of the KV cache that suits kvmp here: one run a block over all layers. None where it might harm.

    With blocks outermost vLLM cannot cut a block into those of a kernel: before 0.32 it refuses to start where it would
    have to. So only for the block size that vLLM chose by itself, or its smallest, of a model that kvmp can serve.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    chosen = getattr(cache, "user_specified_block_size", False) and (cache.block_size or 0) > _NEVER_CUT_TOKENS
    # A MultiConnector refuses children of different wishes, and most others have one.
    if not _is_cuda() or chosen or getattr(model, "is_hybrid", False) or parent_transfer_config() is not None:
        return None
    return "BLHNC"


def specs_to_group() -> list[dict[str, Any]] | None:
    """Each worker's layer specs by name, where the engine core is about to group them and calls us; None elsewhere."""
    return _caller_local((_GROUPING_CALL,), "kv_cache_specs")


def unify_specs() -> Any:
    """vLLM's function that makes several kinds of attention one in a dict of layer specs; ValueError: it cannot."""
    try:
        from vllm.v1.core.kv_cache_planning import unify_hybrid_kv_cache_specs
    except ImportError:  # before 0.33
        from vllm.v1.core.kv_cache_utils import unify_hybrid_kv_cache_specs
    return unify_hybrid_kv_cache_specs


def parent_transfer_config() -> Any:
    """The transfer configuration of the MultiConnector that is calling us, None where none is."""
    vllm_config = _caller_local(_MULTI_CONNECTOR_CALLS, "vllm_config")
    return None if vllm_config is None else vllm_config.kv_transfer_config


def _caller_local(calls: tuple[str, ...], name: str) -> Any:
    """What the nearest of these callers of ours has under a name; None where there is none.

    For what vLLM does not hand to a connector. Tests hold the names against those of every vLLM of the window.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname in calls:
            return frame.f_locals[name]
        frame = frame.f_back
    return None


def unsupported_parallel(vllm_config: Any) -> str | None:
    """Why this engine's parallel shape is beyond the connector, None when it is not."""
    parallel = vllm_config.parallel_config
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}; kvmp does not serve context-parallel engines yet"
    return None


def rank_in_engine() -> tuple[int, int]:
    """This worker's (pipeline rank, tensor-parallel rank)."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_pp_group().rank_in_group, get_tp_group().rank_in_group


def equal_tp_ranks(vllm_config: Any, kv_cache_config: Any) -> int:
    """How many consecutive TP ranks hold the same KV in every layer of theirs; 1 where none do, or nobody knows.

    From 0.31 on vLLM says so of caches whose specs name their shards (`_layer_tp_replicas` in core/kv_cache_utils.py):
    MLA's, which every rank computes whole. The other rules are for what it says nothing of.
    """
    parallel = vllm_config.parallel_config
    width, specs = parallel.tensor_parallel_size, all_layer_specs(kv_cache_config)
    if width == 1 or not specs or getattr(parallel, "decode_context_parallel_size", 1) > 1:
        return 1
    said = getattr(kv_cache_config, "kv_tp_replicas", 1)
    if said > 1:
        return said if width % said == 0 else 1
    kinds = {type(spec) for spec in specs}
    if kinds == {kv_cache_interface.MLAAttentionSpec}:
        return _equal_mla_ranks(vllm_config, specs, width)
    if kinds == {kv_cache_interface.FullAttentionSpec}:
        return _ranks_a_head(vllm_config, specs, width)
    return 1


def _equal_mla_ranks(vllm_config: Any, specs: list[Any], width: int) -> int:
    # Where specs can name their shards, one that does not is of a layer that is not known to be replicated.
    told = any(_names_shards(spec) for spec in specs)
    return 1 if told or not getattr(vllm_config.model_config, "use_mla", False) else width


def _names_shards(spec: Any) -> bool:
    return hasattr(spec, "max_tp_shards")


def _ranks_a_head(vllm_config: Any, specs: list[Any], width: int) -> int:
    """Rank r has KV head r // (width / heads) where there are fewer heads than ranks.

    So `QKVParallelLinear` loads its weights (model_executor/layers/linear.py: `num_kv_head_replicas`, `shard_rank`).
    Only where all layers have the model's number of heads: those of a draft model may have another.
    """
    heads = _kv_heads(vllm_config.model_config)
    one_each = all(spec.num_kv_heads == 1 for spec in specs)
    if getattr(vllm_config, "speculative_config", None) is not None or not one_each or heads < 1 or width % heads:
        return 1
    return width // heads


def _kv_heads(model_config: Any) -> int:
    """KV heads of every layer before they are divided over ranks; 0 where layers differ, or it is not known."""
    total = getattr(model_config, "get_total_num_kv_heads", None)
    architecture = getattr(model_config, "model_arch_config", None)
    if total is None or getattr(architecture, "per_layer_overrides", None):
        return 0
    heads = total()
    text_config = getattr(model_config, "hf_text_config", None)
    named = set(_head_counts(text_config.to_dict())) if text_config is not None else set()
    return heads if isinstance(heads, int) and named <= {heads} else 0


def _head_counts(config: Any) -> Iterable[int]:
    """Every number of KV heads that a model's configuration names: some have one for each kind of layer."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        if any(word in str(key) for word in _KV_HEADS) and value is not None:
            yield from [value] if isinstance(value, int) else [-1]
        else:
            yield from _head_counts(value)


def hash_seed_fact(algorithm: str) -> str:
    """What the first block's parent hash was made from: equal only where hashes agree.

    With ``xxhash*`` and no ``PYTHONHASHSEED`` vLLM draws a seed for each process, so nothing can be shared.
    """
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is not None:
        return "sha256:" + hashlib.sha256(seed.encode()).hexdigest()
    return f"random:{os.urandom(16).hex()}" if algorithm.startswith("xxhash") else "vllm-default"


def hash_rules() -> str:
    """Which rules put LoRA, salts and images into a block hash; they changed with 0.31."""
    return "tagged" if VERSION >= (0, 31) else "untagged"


def attention_backends(vllm_config: Any) -> list[str]:
    """Names of the backends that this worker's attention layers run on."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    backends = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    return sorted(backends)


def kernel_packing(vllm_config: Any, spec: Any) -> str:
    """How the attention kernel orders bytes inside a block: private to it, and on CPU it depends on the machine."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"{current_platform.device_type}:{'+'.join(attention_backends(vllm_config))}"
    from vllm.v1.attention.backends import cpu_attn

    cache_dtype = vllm_config.cache_config.cache_dtype
    isa = cpu_attn._get_attn_isa(spec.dtype, spec.block_size, spec.head_size, cache_dtype)
    return f"cpu:{current_platform.get_cpu_architecture().name}:{isa}"
