"""The engine's KV-cache groups: which of them kvmp serves, and how vLLM comes to keep one where it can."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1 import kv_cache_interface

from kvmp.vllm import compat

# Where the engine core asks for a layout, and then groups the layers.
_GROUPING_CALL = "EngineCore._initialize_kv_caches"

# Exact types: a subclass may keep its blocks by another rule than "every block of the prefix".
_KNOWN_LAYER_SPECS = (kv_cache_interface.FullAttentionSpec, kv_cache_interface.MLAAttentionSpec)


def unsupported_cache(kv_cache_config: Any) -> str | None:
    """Why this engine's cache groups are beyond the connector, None when they are not."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        return "the engine has no KV cache: its model has no attention to earlier tokens"
    if len(groups) > 1:
        kinds = sorted({type(spec).__qualname__ for spec in compat.all_layer_specs(kv_cache_config)})
        return f"the engine has {len(groups)} KV-cache groups, of {', '.join(kinds)}; kvmp serves engines of one"
    group = groups[0]
    if not getattr(group, "enable_kv_transfer", True):
        return "the engine's KV-cache group must not be transferred (enable_kv_transfer is off)"
    if getattr(group, "host_resident", False):
        return "the engine's KV-cache group lies in host memory of its own"
    for spec in compat.layer_specs(group.kv_cache_spec):
        if type(spec) not in _KNOWN_LAYER_SPECS:
            return f"layer spec {type(spec).__module__}.{type(spec).__qualname__} is not known to kvmp"
    return None


def unite(vllm_config: Any, logger: logging.Logger) -> bool:
    """Has vLLM keep a model's kinds of attention in one KV-cache group, where it can; False where kvmp cannot serve it.

    vLLM itself does so for connectors without `SupportsHMA`, whatever the model: those that cannot be united, such as
    Mamba hybrids, then do not start. To be called where a layout is asked for, which is before layers are grouped.
    """
    workers = compat.caller_local((_GROUPING_CALL,), "kv_cache_specs")
    if workers is None:
        return True
    if compat.unsupported_parallel(vllm_config):
        return False
    apart = {name: spec for specs in workers for name, spec in specs.items()}
    united = _united(apart)
    if not united or any(type(spec) not in _KNOWN_LAYER_SPECS for spec in united.values()):
        return False
    scheduler = vllm_config.scheduler_config
    if united != apart and not scheduler.disable_hybrid_kv_cache_manager:
        scheduler.disable_hybrid_kv_cache_manager = True
        logger.info("kvmp: this model's kinds of attention are kept in one KV-cache group, as kvmp serves one")
    return True


def _united(apart: dict[str, Any]) -> dict[str, Any]:
    """The layer specs as those of one group; none where they cannot be."""
    united = dict(apart)
    if not all(isinstance(spec, kv_cache_interface.AttentionSpec) for spec in apart.values()):
        return {}
    try:
        compat.unify_specs()(united)
    except ValueError:
        return {}
    return united
