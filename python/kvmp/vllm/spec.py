"""Builds the namespace spec: every fact that shapes an engine's KV bytes, from its configuration and its workers.

The scheduler side builds it from the configuration, so that all roles agree; each worker adds its part's layout and
the few facts that only it knows. Two engines that differ in any fact share nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from kvmp.vllm import compat
from kvmp.vllm.metadata import PartMeta
from kvmp.vllm.weights import local_weights_digest

_HASH_BYTES = {"sha256": 32, "sha256_cbor": 32, "xxhash": 16, "xxhash_cbor": 16}
# Where a model was found and what wrote its file say nothing about its bytes.
_NOT_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")


class SpecRefusedError(Exception):
    """This engine's KV cannot be shared; the text says why."""


def canonical(value: Any) -> str:
    """JSON with sorted keys; what JSON does not know is written by its `repr` or name."""
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return getattr(value, "name", None) or str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def layout_digest(layout: str) -> dict[str, str]:
    """What stands for a part's canonical layout in the namespace spec: SHA-256 of its text."""
    return {"sha256": hashlib.sha256(layout.encode()).hexdigest()}


def _hf_facts(hf_config: Any) -> dict[str, Any]:
    fields = {key: value for key, value in hf_config.to_dict().items() if key not in _NOT_THE_MODEL}
    rope = {key: value for key, value in fields.items() if "rope" in key or "position_embeddings" in key}
    return {"config_sha256": _digest(fields), "rope": json.loads(canonical(rope))}


def _model_facts(model_config: Any) -> dict[str, Any]:
    return {
        "revision": getattr(model_config, "revision", None),
        "files_sha256": local_weights_digest(model_config.model),
        "dtype": str(model_config.dtype),
        "quantization": str(getattr(model_config, "quantization", None)),
        # Long-rope factors are chosen by it.
        "max_model_len": model_config.max_model_len,
        "processor": _digest(getattr(model_config, "mm_processor_kwargs", None)),
        **_hf_facts(model_config.hf_config),
    }


def _load_facts(vllm_config: Any) -> dict[str, Any]:
    load_format = str(getattr(vllm_config.load_config.load_format, "value", vllm_config.load_config.load_format))
    seed = vllm_config.model_config.seed if load_format == "dummy" else None
    return {"format": load_format, "seed": seed}


def _cache_facts(cache_config: Any, block_tokens: int) -> dict[str, Any]:
    if getattr(cache_config, "calculate_kv_scales", False):
        raise SpecRefusedError(
            "KV scales are computed at run time (calculate_kv_scales), which no other engine can repeat"
        )
    return {"dtype": str(cache_config.cache_dtype), "block_size": cache_config.block_size, "block_tokens": block_tokens}


def _parallel_facts(parallel: Any) -> dict[str, int]:
    names = ("tensor", "pipeline", "prefill_context", "decode_context")
    return {name: getattr(parallel, f"{name}_parallel_size", 1) for name in names}


def _hash_facts(cache_config: Any) -> dict[str, Any]:
    algorithm = str(cache_config.prefix_caching_hash_algo)
    return {
        "algorithm": algorithm,
        "bytes": _HASH_BYTES.get(algorithm),
        "rules": compat.hash_rules(),
        "seed": compat.hash_seed_fact(algorithm),
    }


def _draft_facts(vllm_config: Any) -> dict[str, Any] | None:
    draft = getattr(vllm_config, "speculative_config", None)
    if draft is None:
        return None
    model = getattr(draft, "model", None)
    return {
        "method": str(getattr(draft, "method", None)),
        "model": model,
        "revision": getattr(draft, "revision", None),
        "files_sha256": local_weights_digest(model) if model else None,
    }


def engine_facts(vllm_config: Any, block_tokens: int, *, verify: bool = False) -> dict[str, Any]:
    """Every fact of the configuration that sets engines apart, as JSON values: all facts but the workers'.

    Args:
        verify: whether its parts are stored with sums; those of other engines, without, could not be checked.

    Raises:
        SpecRefusedError: the engine's KV cannot be shared.
        OSError: the model's files cannot be read.
    """
    facts = {
        "vllm": f"{compat.VERSION[0]}.{compat.VERSION[1]}",
        "model": _model_facts(vllm_config.model_config),
        "load": _load_facts(vllm_config),
        "cache": _cache_facts(vllm_config.cache_config, block_tokens),
        "parallel": _parallel_facts(vllm_config.parallel_config),
        "hash": _hash_facts(vllm_config.cache_config),
        "draft": _draft_facts(vllm_config),
    }
    return {**facts, "sums": "xxh3"} if verify else facts


def ordered_parts(parts: Mapping[tuple[int, int], PartMeta], vllm_config: Any) -> tuple[PartMeta, ...]:
    """What the workers gave, by rank, each there exactly once.

    Args:
        parts: what the workers gave, by (pipeline rank, tensor-parallel rank).

    Raises:
        SpecRefusedError: a part is missing, stands at the wrong place, or its worker cannot take part.
    """
    parallel = vllm_config.parallel_config
    width = parallel.tensor_parallel_size
    expected = width * parallel.pipeline_parallel_size
    by_index = {pp * width + tp: meta for (pp, tp), meta in parts.items() if meta is not None}
    if sorted(by_index) != list(range(expected)):
        missing = sorted(set(range(expected)) - set(by_index))
        raise SpecRefusedError(
            f"{expected} workers, but layouts of the ranks {sorted(by_index)} only; the log of the worker of rank "
            f"{', '.join(map(str, missing)) or 'out of range'} has the cause"
        )
    for index, meta in by_index.items():
        if not isinstance(meta, PartMeta):
            raise SpecRefusedError(
                f"the worker of rank {index} answered with {type(meta).__name__}: a MultiConnector hands on the first "
                "child's answer only, so kvmp cannot be used beside a connector that answers itself"
            )
        if meta.off:
            raise SpecRefusedError(meta.off)
        if meta.rank != index:
            raise SpecRefusedError(f"the worker of rank {index} says it is rank {meta.rank}")
    return tuple(by_index[index] for index in range(expected))


def build_spec(
    vllm_config: Any, block_tokens: int, parts: tuple[PartMeta, ...], *, verify: bool = False
) -> NamespaceSpec:
    """The namespace spec of this engine's plain requests.

    Args:
        block_tokens: tokens of one block, which is also what one block hash covers.
        parts: the parts as their writers gave them, by index.
        verify: as in `engine_facts`.

    Raises:
        SpecRefusedError: the engine's KV cannot be shared.
        OSError: the model's files cannot be read.
    """
    facts = engine_facts(vllm_config, block_tokens, verify=verify)
    facts["workers"] = [json.loads(part.facts_json) for part in parts]
    return NamespaceSpec(
        model=vllm_config.model_config.model,
        facts=facts,
        groups=(GroupSpec(block_tokens=block_tokens),),
        parts=tuple(PartSpec(bytes=(part.block_bytes,), layout=json.loads(part.layout_json)) for part in parts),
    )
