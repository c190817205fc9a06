"""Runs engine.py against a server of its own, and says what must be true of whatever it reports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu.rig import served

ENGINE = Path(__file__).parent / "engine.py"
# From an engine's start to its end; 45 to 110 of them are the start.
ENGINE_S = 150.0
# With the server, and the model where its weights are written.
TEST_S = ENGINE_S + 30.0
# What a machine with no network, and a vLLM without FlashInfer, want.
_DEFAULTS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
# NVLink multicast may put a shared host's GPUs out of service, and the ranks' sums are not what is tested.
_NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
_PLAIN_SUMS = {
    "disable_custom_all_reduce": True,
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}


def load_again(folder: Path, model: dict[str, Any], *, ranks: int = 1, layout: str | None = None) -> dict[str, Any]:
    """What the engine reports; `layout` goes over kvmp's wish."""
    environment, llm = _DEFAULTS | os.environ, dict(model)
    if layout is not None:
        environment["VLLM_KV_CACHE_LAYOUT"] = layout
    if ranks > 1:
        environment |= _NO_MULTICAST
        llm |= {"tensor_parallel_size": ranks, **_PLAIN_SUMS}
    with served("2GiB") as server:
        options = json.dumps({"endpoint": server.endpoint, "llm": llm})
        out = _output_of([sys.executable, str(ENGINE), options], environment, folder / "engine.log")
    found = [line for line in out.splitlines() if line.startswith("RESULT ")]
    assert found, f"the engine gave no result:\n{out[-8000:]}"
    result = json.loads(found[0].removeprefix("RESULT "))
    print(json.dumps({key: value for key, value in result.items() if key not in ("lengths", "cached_tokens")}))
    return result


def _output_of(command: list[str], environment: dict[str, str], log: Path) -> str:
    """What it printed, errors too; none of its processes is left."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(ENGINE_S)
        except subprocess.TimeoutExpired:
            out.write(f"\nnot at its end within {ENGINE_S} s\n".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")


def check_kind(result: dict[str, Any]) -> None:
    """The engine was what vLLM makes of a GPU by default, which no CPU test has: model runner V2, steps scheduled while
    others run, CUDA graphs, and those were replayed."""
    assert result["steps_in_flight"] == 2
    for facts in result["facts"]:
        assert facts["runner"] == "vllm.v1.worker.gpu.model_runner"
        assert facts["async_scheduling"]
        assert "FULL" in facts["cudagraphs"]
        assert facts["replays"] > 0


def check_found(result: dict[str, Any]) -> None:
    """Every block of every prompt was found, where the GPU's own cache had none left."""
    block = result["block_tokens"]
    assert result["left"] == 0
    full = [length // block * block for length in result["lengths"]]
    assert result["cached_tokens"] == full
    for rank in result["ranks"]:
        assert rank["again"] == sum(full) // block, rank


def check_bytes(result: dict[str, Any]) -> None:
    """On every rank each block that was loaded has the bytes that this rank computed."""
    for rank in result["ranks"]:
        assert rank["distinct"] == rank["computed"], "blocks that are alike would let a wrong one pass"
        assert rank["other_bytes"] == 0, rank
