"""A connector that can be asked, in the engine's processes, what is in the cache: see engine.py.

The engine core knows which blocks are cached, each rank the bytes of its own; with one rank both are one process.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvmp.vllm import compat
from kvmp.vllm.connector import KvmpConnector

__all__ = ["ProbedConnector", "count_replays", "digests", "facts", "poison"]

# Of the engine core.
_hashes: dict[bytes, None] = {}
# Of a rank.
_tensors: dict[str, torch.Tensor] = {}
_blocks: list[int] = []
_replays: list[int] = []


class ProbedConnector(KvmpConnector):
    """As it is, with its tensors, block pool and block hashes noted, and calls of its own in the engine core."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        _tensors.update(kv_caches)
        _blocks.append(self._kv_cache_config.num_blocks)
        super().register_kv_caches(kv_caches)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        from vllm.v1.engine.core import EngineCore

        # For `call_utility`, which calls methods of the engine core by name.
        EngineCore.kvmp_cached_blocks = lambda _core: _cached_blocks(gpu_block_pool)
        EngineCore.kvmp_pending = lambda _core: self.has_pending_push_work()
        EngineCore.kvmp_steps_in_flight = lambda core: core.batch_queue_size
        super().bind_gpu_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        _hashes.update(dict.fromkeys(request.block_hashes))
        super().on_new_request(request)


def _cached_blocks(pool: Any) -> dict[str, int]:
    """Block hash -> block, of the prompts' blocks that the GPU has now."""
    found = {block_hash.hex(): pool.get_cached_block(block_hash, [0]) for block_hash in _hashes}
    return {block_hash: cached[0].block_id for block_hash, cached in found.items() if cached}


# Calls of a rank, for `collective_rpc`.


def digests(worker: Any, blocks: dict[str, int]) -> dict[str, str]:
    """Block hash -> digest of this rank's bytes of that block over all layers."""
    torch.cuda.synchronize()
    return {block_hash: _digest(block) for block_hash, block in blocks.items()}


def _digest(block: int) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors.values():
        ratio = tensor.shape[0] // _blocks[0]
        rows = tensor[block * ratio : (block + 1) * ratio].contiguous().view(torch.uint8)
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def poison(worker: Any) -> None:
    """Spoils every block, so that none is right that was not written anew."""
    torch.cuda.synchronize()
    for tensor in _tensors.values():
        tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16).fill_(0x5A)
    torch.cuda.synchronize()


def count_replays(worker: Any) -> None:
    """Counts, from now on, the steps that replay a CUDA graph of the whole forward."""
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    if manager is not None:
        replay = manager.run_fullgraph

        def counted(*arguments: Any) -> Any:
            _replays.append(1)
            return replay(*arguments)

        manager.run_fullgraph = counted


def facts(worker: Any) -> dict[str, Any]:
    """What kind of engine this is."""
    config = worker.vllm_config
    return {
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "backends": compat.attention_backends(config),
        "block_tokens": config.cache_config.block_size,
        "cudagraphs": str(config.compilation_config.cudagraph_mode),
        "device": str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid),
        "replays": len(_replays),
        "runner": type(worker.model_runner).__module__,
        "strides": [list(tensor.stride()) for tensor in list(_tensors.values())[:1]],
    }
