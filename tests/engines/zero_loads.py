"""A connector that is wrong on purpose: what it loads arrives as zeros. For the suite's negative control."""

from typing import Any

import torch

from kvmp import paged
from kvmp.vllm.connector import KvmpConnector as RightConnector

_tensors: list[torch.Tensor] = []
_load = paged.PagedKV.begin_load


class KvmpConnector(RightConnector):
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        _tensors.extend(kv_caches.values())
        super().register_kv_caches(kv_caches)


def _load_zeros(self: paged.PagedKV, client: Any, ns: Any, block_ids: Any, *rest: Any, **options: Any) -> Any:
    good = _load(self, client, ns, block_ids, *rest, **options)
    for tensor in _tensors:
        tensor[torch.as_tensor(block_ids)] = 0
    return good


paged.PagedKV.begin_load = _load_zeros
