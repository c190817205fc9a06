"""A connector that can be asked, in the engine's process, for the bytes of cached blocks: see test_engine.py."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvmp.vllm.connector import KvmpConnector

__all__ = ["KvmpConnector", "bytes_of_cached_blocks", "facts", "poison"]

_tensors: dict[str, torch.Tensor] = {}
_hashes: dict[bytes, None] = {}
_pools: list[Any] = []


class ProbedConnector(KvmpConnector):
    """As it is, with its tensors, block pool and block hashes noted."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        _tensors.update(kv_caches)
        super().register_kv_caches(kv_caches)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        _pools.append(gpu_block_pool)
        super().bind_gpu_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        _hashes.update(dict.fromkeys(request.block_hashes))
        super().on_new_request(request)


def bytes_of_cached_blocks(worker: Any) -> dict[str, str]:
    """Block hash -> digest of that block's bytes over all layers, of the blocks that the GPU has now."""
    torch.cuda.synchronize()
    found = {}
    for block_hash in _hashes:
        cached = _pools[0].get_cached_block(block_hash, [0])
        if cached:
            found[block_hash.hex()] = _digest(cached[0].block_id)
    return found


def _digest(block: int) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors.values():
        ratio = tensor.shape[0] // _pools[0].num_gpu_blocks
        rows = tensor[block * ratio : (block + 1) * ratio].contiguous().view(torch.uint8)
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def poison(worker: Any) -> None:
    """Spoils every block, so that none is right that was not written anew."""
    torch.cuda.synchronize()
    for tensor in _tensors.values():
        tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16).fill_(0x5A)
    torch.cuda.synchronize()


def facts(worker: Any) -> dict[str, Any]:
    """What kind of engine this is."""
    config = worker.vllm_config
    return {
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraphs": str(config.compilation_config.cudagraph_mode),
        "runner": type(worker.model_runner).__module__,
        "strides": [list(tensor.stride()) for tensor in list(_tensors.values())[:1]],
    }
