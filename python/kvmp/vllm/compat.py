"""Where vLLM 0.29 to 0.33 differ: the only file that probes for what a version has; `version.py` says which it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1 import kv_cache_interface

from kvmp.vllm import version

# Where nothing says which it is, nothing is relied on that the oldest lacks.
VERSION = version.number() or version.WRITTEN_FOR[0]

# 0.30+ reports a failed load by request; 0.29 knows failed blocks only.
TransferResults = getattr(base, "KVConnectorTransferResults", None)

# Exact types: a subclass may keep its blocks by another rule than "every block of the prefix".
_KNOWN_LAYER_SPECS = (kv_cache_interface.FullAttentionSpec, kv_cache_interface.MLAAttentionSpec)


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


def unsupported_cache(kv_cache_config: Any) -> str | None:
    """Why this engine's cache groups are beyond the connector, None when they are not."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the engine has {len(groups)} KV-cache groups; kvmp serves one (--disable-hybrid-kv-cache-manager)"
    group = groups[0]
    if not getattr(group, "enable_kv_transfer", True):
        return "the engine's KV-cache group must not be transferred (enable_kv_transfer is off)"
    if getattr(group, "host_resident", False):
        return "the engine's KV-cache group lies in host memory of its own"
    for spec in layer_specs(group.kv_cache_spec):
        if type(spec) not in _KNOWN_LAYER_SPECS:
            return f"layer spec {type(spec).__module__}.{type(spec).__qualname__} is not known to kvmp"
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


def wished_layout() -> str | None:
    """The memory order of the KV cache that suits kvmp here: one run a block over all layers."""
    return "BLHNC" if _is_cuda() else None


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
