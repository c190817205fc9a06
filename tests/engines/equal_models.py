"""A tiny model whose KV is the same on both of two tensor-parallel ranks, seeded, its tokens dependent on it."""

from pathlib import Path

from demo.model import write_model

MAX_TOKENS = 1_024


def one_kv_head(folder: Path) -> str:
    """The folder of a Llama of one KV head, made there."""
    write_model(folder, kv_heads=1, max_tokens=MAX_TOKENS)
    return str(folder)
