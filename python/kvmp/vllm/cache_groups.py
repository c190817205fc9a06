"""Which engines' caches kvmp serves, and how vLLM comes to keep a cache in one group where it can."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1 import kv_cache_interface as kinds

from kvmp.vllm import compat

# Exact types: a subclass may keep its blocks by another rule than "every block of the prefix".
_SERVED = (kinds.FullAttentionSpec, kinds.MLAAttentionSpec)

# Those that vLLM can make one of the former: with their blocks kept although no later token needs them.
_LOCAL = (kinds.SlidingWindowSpec, kinds.SlidingWindowMLASpec, kinds.ChunkedLocalAttentionSpec)


def unsupported_cache(kv_cache_config: Any) -> str | None:
    """Why this engine's cache groups are beyond the connector, None when they are not."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        return "the engine has no KV cache: its model has no attention to earlier tokens"
    if len(groups) > 1:
        return _several(len(groups), compat.all_layer_specs(kv_cache_config))
    for spec in compat.layer_specs(groups[0].kv_cache_spec):
        if type(spec) not in _SERVED:
            return f"layers are of {type(spec).__module__}.{type(spec).__qualname__}, which kvmp does not serve"
        if getattr(spec, "non_causal", False):
            return "layers attend to later tokens: their KV is not that of a prefix alone"
    return compat.unsupported_group(groups[0])


def unsupported_engine(vllm_config: Any) -> str | None:
    """Why this engine's configuration is beyond the connector, None when it is not.

    vLLM switches its prefix caching off where a prefix's KV is no function of the prefix, or where a forward must have
    the whole prompt: non-causal attention, pooling over all tokens. What is found in kvmp is a prefix as well.
    """
    if not vllm_config.cache_config.enable_prefix_caching:
        return "vLLM's prefix caching is off: this model cannot go on from a prefix's KV, or the user does not want it"
    return compat.unsupported_parallel(vllm_config)


def _several(groups: int, specs: list[Any]) -> str:
    named = ", ".join(sorted({type(spec).__qualname__ for spec in specs}))
    mend = "; start vLLM with --disable-hybrid-kv-cache-manager" if _united(dict(enumerate(specs))) else ""
    return f"the engine has {groups} KV-cache groups, of {named}; kvmp serves engines of one{mend}"


def unite(vllm_config: Any, logger: logging.Logger) -> bool:
    """Has vLLM keep a model's kinds of attention in one KV-cache group, where it can; False where kvmp serves none.

    vLLM itself does so for connectors without `SupportsHMA`, whatever the model: those that cannot be united, such as
    Mamba hybrids, then do not start. To be called where a layout is asked for, which is before layers are grouped.
    """
    workers = compat.specs_to_group()
    if workers is None:
        return True
    if unsupported_engine(vllm_config) or compat.unsupported_sleep_on_gpu(vllm_config):
        return False
    apart = {name: spec for specs in workers for name, spec in specs.items()}
    united = _united(apart)
    if united != apart and united and not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        logger.warning(
            "kvmp: this model's kinds of attention are kept in one KV-cache group, as kvmp serves one. Blocks that "
            "have left a sliding window keep their memory then, so a shorter max_model_len may fit than without kvmp."
        )
    return bool(united)


def follow(vllm_config: Any, kv_cache_config: Any) -> None:
    """Has a worker's configuration say what its engine core's says, where groups were united.

    The worker's is a copy of before that. Other connectors of a MultiConnector read there how caches are grouped.
    """
    specs = compat.all_layer_specs(kv_cache_config)
    is_local = [getattr(spec, name, None) for spec in specs for name in ("sliding_window", "attention_chunk_size")]
    if any(is_local) and not unsupported_cache(kv_cache_config):
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True


def _united(apart: dict[Any, Any]) -> dict[Any, Any]:
    """The layer specs as those of one group that kvmp serves; none where they cannot be."""
    united, found = dict(apart), {type(spec) for spec in apart.values()}
    # What vLLM would refuse is not tried: it might warn of it first.
    if not found <= {*_SERVED, *_LOCAL} or not found & {*_SERVED}:
        return {}
    try:
        compat.unify_specs()(united)
    except ValueError:
        return {}
    return united if all(type(spec) in _SERVED for spec in united.values()) else {}
