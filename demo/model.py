"""The tiny Llama that the demo and the tests run: made here, seeded, so that nothing is downloaded."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VOCABULARY = 32_000
MAX_TOKENS = 8_192
SEED = 3
LAYERS, HEAD_SIZE = 4, 64

# Weights as vLLM's load_format="dummy" makes them lie so near zero that the tokens do not depend on the KV, and a wrong
# KV would go unseen. With this spread, one other prompt token changes nearly every token that follows.
_INITIALIZER_RANGE = 0.3


def ensure_model(folder: Path) -> Path:
    """The model's folder, made first unless it is there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            write_model(Path(scratch) / "model", kv_heads=2, max_tokens=MAX_TOKENS)
            (Path(scratch) / "model").rename(folder)  # so that a folder that is there is complete
    return folder


def write_model(folder: Path, *, kv_heads: int, max_tokens: int, **settings: Any) -> None:
    """Makes a Llama there whose tokens depend on its KV; `settings`: more of its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max_tokens,
        initializer_range=_INITIALIZER_RANGE,
        tie_word_embeddings=True,
        dtype="float32",
        **settings,
    )
    save_seeded(folder, LlamaForCausalLM, config)


def save_seeded(folder: Path, architecture: Any, config: Any) -> None:
    """Saves a model of that architecture with the same random weights each time."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(SEED)
    architecture(config).save_pretrained(folder)
