"""A real vLLM on a GPU, asynchronous scheduling and CUDA graphs on: blocks loaded are, byte for byte, as computed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kvmp  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

PORT = 5599
ENGINE = Path(__file__).parent / "engine.py"


def run(layout: str | None) -> dict[str, Any]:
    """What the engine reports; `layout` goes over kvmp's wish."""
    chosen = {"VLLM_KV_CACHE_LAYOUT": layout} if layout else {}
    environment = {**os.environ, **chosen}
    with kvmp.launch("4GiB", tcp=f"127.0.0.1:{PORT}"):
        done = subprocess.run(
            [sys.executable, str(ENGINE), str(PORT)], env=environment, capture_output=True, text=True, timeout=280
        )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, f"the engine gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    result = json.loads(found[0].removeprefix("RESULT "))
    print(json.dumps({key: value for key, value in result.items() if key not in ("lengths", "cached_tokens")}))
    return result


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here")
@pytest.mark.parametrize("layout", [None, "LBNHC"])
def test_what_is_loaded_is_what_was_computed(layout: str | None) -> None:
    result = run(layout)
    assert result["async_scheduling"]
    assert "NONE" not in result["cudagraphs"]
    # Every block was found: the local cache had none left.
    assert result["left"] == 0
    full = [length // 16 * 16 for length in result["lengths"]]
    assert all(found == of for found, of in zip(result["cached_tokens"], full, strict=True)), result["cached_tokens"]
    assert result["blocks"] == sum(full) // 16
    assert result["distinct"] == result["computed"], "blocks that are alike would let a wrong one pass"
    assert result["other_bytes"] == 0
