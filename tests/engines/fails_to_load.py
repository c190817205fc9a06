"""Another connector for a MultiConnector: it says that it loads the first blocks of a prompt, and brings rubbish.

It does so within the step (synchronously), once for each prompt, and reports the blocks failed with the step's output.
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from tests.engines.harness import BLOCK

BLOCKS = 2


class Claims(KVConnectorMetadata):
    """Engine blocks that are to be loaded in this step."""

    def __init__(self, blocks: list[int]):
        self.blocks = blocks


class FailsToLoad(KVConnectorBase_V1):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self._seen: set[str] = set()
        self._blocks: list[int] = []
        self._failed: set[int] = set()
        self._tensors: list[torch.Tensor] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        prompt = str(request.prompt_token_ids)
        again = prompt in self._seen
        self._seen.add(prompt)
        return (0 if again or num_computed_tokens else BLOCKS * BLOCK), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._blocks += blocks.get_block_ids()[0][:BLOCKS]

    def build_connector_meta(self, scheduler_output: Any) -> Claims:
        blocks, self._blocks = self._blocks, []
        return Claims(blocks)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._tensors = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        blocks = self._get_connector_metadata().blocks
        for tensor in self._tensors:
            tensor[torch.as_tensor(blocks, dtype=torch.long)] = 7
        self._failed.update(blocks)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...
