"""The tiny models of the engines: a folder each, and what vLLM must be told of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_COMMON = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# DeepSeek-V2-Lite's attention: of these dimensions Hopper has kernels, for the prefill (FlashAttention 3) and for the
# decode (that, or Triton). Its layers are dense, as no expert's kernel is wanted here.
_LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": _COMMON["num_hidden_layers"],
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
# In a process of its own: a process that has used torch's threads had better not fork, as vLLM does.
_WRITE = """
import pathlib, sys
from demo.model import write_model
write_model(pathlib.Path(sys.argv[1]), kv_heads=int(sys.argv[2]), max_tokens=8192)
"""


def llama(folder: Path) -> dict[str, Any]:
    """Four KV heads. vLLM makes up the weights, which are alike on all ranks."""
    return _dummy(folder, _LLAMA)


def latent(folder: Path) -> dict[str, Any]:
    """Multi-head latent attention: one latent a token, which every rank computes whole."""
    return _dummy(folder, _LATENT)


def two_kv_heads(folder: Path) -> dict[str, Any]:
    """A Llama whose two heads have weights of their own: of two ranks, each has other KV."""
    return _written(folder, 2)


def one_kv_head(folder: Path) -> dict[str, Any]:
    """A Llama of which every rank has the same KV."""
    return _written(folder, 1)


def _dummy(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(_COMMON | config))
    return {"model": str(folder), "load_format": "dummy"}


def _written(folder: Path, kv_heads: int) -> dict[str, Any]:
    subprocess.run([sys.executable, "-c", _WRITE, str(folder), str(kv_heads)], cwd=ROOT, check=True, timeout=60)
    return {"model": str(folder), "dtype": "bfloat16"}
