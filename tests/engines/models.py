"""Tiny models, seeded, whose KV is not like that of the demo's Llama: each named after what is different."""

from pathlib import Path
from typing import Any

from demo.model import LAYERS, save_seeded, write_model

MAX_TOKENS = 1_024
WINDOW = 64
SMALL_VOCABULARY = 1_000


def one_kv_head(folder: Path) -> str:
    """A Llama of one KV head, which is the same on both of two tensor-parallel ranks; its tokens depend on its KV."""
    write_model(folder, kv_heads=1, max_tokens=MAX_TOKENS)
    return str(folder)


def with_windows(folder: Path) -> str:
    """A Llama whose layers are by turns of a sliding window and of full attention; its tokens depend on its KV."""
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    write_model(folder, kv_heads=2, max_tokens=MAX_TOKENS, layer_types=kinds, sliding_window=WINDOW)
    return str(folder)


def encoder(folder: Path) -> str:
    """A BERT, which embeds, and has no KV cache."""
    from transformers import BertConfig, BertModel

    return _small(folder, BertModel, BertConfig)


def recurrent(folder: Path) -> str:
    """An LFM2, whose layers are by turns convolutions with a state and full attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    kinds = ["conv", "full_attention"] * (LAYERS // 2)
    # vLLM reads sizes that Transformers' own configuration no longer has.
    sizes = {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 256, "block_auto_adjust_ff_dim": False}
    return _small(folder, Lfm2ForCausalLM, Lfm2Config, num_key_value_heads=2, layer_types=kinds, **sizes)


def _small(folder: Path, architecture: Any, config: Any, **settings: Any) -> str:
    sizes = {"vocab_size": SMALL_VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    limits = {"num_hidden_layers": LAYERS, "max_position_embeddings": MAX_TOKENS}
    save_seeded(folder, architecture, config(**sizes, **limits, **settings))
    return str(folder)
