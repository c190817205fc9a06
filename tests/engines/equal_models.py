"""A tiny model whose KV is the same on both of two tensor-parallel ranks, seeded, its tokens dependent on it."""

from pathlib import Path

from demo.model import SEED, VOCABULARY

MAX_TOKENS = 1_024
LAYERS, HEAD_SIZE = 4, 64
# As in `demo.model`: smaller, and the tokens would not depend on the KV.
_SPREAD = 0.3


def one_kv_head(folder: Path) -> str:
    """The folder of a Llama of one KV head, made there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=_SPREAD,
        tie_word_embeddings=True,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
