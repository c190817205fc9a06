"""LoRA adapters: each has a namespace of its own, named by what it contains."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import kvmp
from demo.engine import Engine, Output
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, forget, loaded_tokens, random_prompt, stats, until

BLOCKS = 6
RANK = 8
LAYERS = 4
HIDDEN = 256


def test_adapters_share_nothing_with_each_other_or_the_plain_model(start_engine: StartEngine, tmp_path: Path) -> None:
    first, second = _adapter(tmp_path / "first", 1), _adapter(tmp_path / "second", 2)
    prompt = random_prompt("adapted", BLOCKS * BLOCK + 1)
    with kvmp.launch("64MiB") as server:
        engine = start_engine(
            endpoint=server.endpoint, engine_args={"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
        ).wait_up()
        computed = {adapter: _stored(server, engine, prompt, adapter) for adapter in (first, second, None)}
        assert len({tuple(output.tokens) for output in computed.values()}) == 3
        assert stats(server)["blocks_ready"] == 3 * BLOCKS
        for adapter in (first, second, None):
            output, loaded = _found(engine, prompt, adapter)
            assert loaded == BLOCKS * BLOCK
            assert output.tokens == computed[adapter].tokens
        now = stats(server)
        assert (now["blocks_ready"], now["namespaces"]) == (3 * BLOCKS, 3)
        # Other weights under the name and path of the first: vLLM's hashes are the same, and still nothing is shared.
        _write_adapter(Path(first), 3)
        output = _stored(server, engine, prompt, first, edition=1)
        assert output.tokens != computed[first].tokens
        now = stats(server)
        assert (now["blocks_ready"], now["namespaces"]) == (4 * BLOCKS, 4)
        assert "adapter_sha256" in [line for line in server.log().splitlines() if "shares nothing with" in line][-1]


def _stored(server: kvmp.Server, engine: Engine, prompt: list[int], adapter: str | None, edition: int = 0) -> Output:
    """The answer as computed, once its prompt is stored: an adapter's namespace is opened after its first request."""
    before = stats(server)["blocks_ready"]

    def stored() -> Output | None:
        output, loaded = _found(engine, prompt, adapter, edition)
        assert loaded == 0
        ready = stats(server)["blocks_ready"] - before
        assert ready in (0, BLOCKS)
        return output if ready else None

    return until(stored, f"the prompt stored with adapter {adapter}")


def _found(engine: Engine, prompt: list[int], adapter: str | None, edition: int = 0) -> tuple[Output, int]:
    """The answer, and how many tokens of it came from kvmp; nothing stays pinned or in the engine's own cache."""
    before = loaded_tokens(engine)
    output = engine.submit(prompt, NEW_TOKENS, adapter=adapter, adapter_edition=edition).result()
    forget(engine)
    return output, loaded_tokens(engine) - before


def _adapter(folder: Path, seed: int) -> str:
    folder.mkdir()
    _write_adapter(folder, seed)
    return str(folder)


def _write_adapter(folder: Path, seed: int) -> None:
    """A seeded adapter of PEFT's format, strong enough to change every token."""
    numbers, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        tensors[f"{name}.lora_A.weight"] = numbers.normal(size=(RANK, HIDDEN)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = numbers.normal(size=(HIDDEN // 2, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
