"""Models whose cache is not one group of full attention: served where vLLM can unite it, else as if without kvmp."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvmp
from demo.engine import Engine
from tests.engines import models
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, await_blocks, forget, random_prompt

BLOCKS = 3 * models.WINDOW // BLOCK  # longer than a window
PROMPT = random_prompt("groups", BLOCKS * BLOCK + 1)
SMALL_PROMPT = [token % models.SMALL_VOCABULARY for token in PROMPT]


@dataclass(frozen=True)
class Engines:
    """One of each kind, started side by side, as most of it is their start."""

    server: kvmp.Server
    with_windows: Engine
    recurrent: Engine
    encoder: Engine
    pooler: Engine


@pytest.fixture(scope="module")
def engines(start_engine: StartEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder: Path = tmp_path_factory.mktemp("models")
    with kvmp.launch("64MiB") as server:
        served = {"endpoint": server.endpoint, "max_model_len": models.MAX_TOKENS}
        own_blocks = {**served, "block_tokens": None}
        with_windows = {"model": models.with_windows(folder / "windows")}
        recurrent = {"model": models.recurrent(folder / "recurrent")}
        encoder = {"model": models.encoder(folder / "encoder"), "runner": "pooling"}
        # The mean of all tokens' states: vLLM ends an engine that is to go on from a prefix.
        pooler = {"model": models.one_kv_head(folder / "pooler"), "runner": "pooling", "convert": "embed"}
        pooler["pooler_config"] = {"seq_pooling_type": "MEAN"}
        yield Engines(
            server,
            start_engine(engine_args=with_windows, **served),
            start_engine(engine_args=recurrent, **own_blocks),
            start_engine(engine_args=encoder, **own_blocks),
            start_engine(engine_args=pooler, **served),
        )


def test_sliding_windows_beside_full_attention_are_served(engines: Engines) -> None:
    engine = engines.with_windows.wait_up()
    [computed] = engine.generate([PROMPT], NEW_TOKENS)
    await_blocks(engines.server, BLOCKS)
    forget(engine)
    [loaded] = engine.generate([PROMPT], NEW_TOKENS)
    assert (computed.cached_tokens, loaded.cached_tokens) == (0, BLOCKS * BLOCK)
    assert loaded.tokens == computed.tokens
    assert "kept in one KV-cache group" in engine.log_path.read_text()


def test_a_model_with_a_recurrent_state_runs_without_kvmp(engines: Engines) -> None:
    engine = engines.recurrent.wait_up()
    [output] = engine.generate([SMALL_PROMPT], NEW_TOKENS)
    assert output.finish == "length"
    assert "kvmp is switched off: the engine has 2 KV-cache groups" in engine.log_path.read_text()


def test_a_model_without_a_cache_runs_without_kvmp(engines: Engines) -> None:
    engine = engines.encoder.wait_up()
    assert engine.embed(SMALL_PROMPT) != engine.embed(SMALL_PROMPT[1:])
    assert "kvmp is switched off: the engine has no KV cache" in engine.log_path.read_text()


def test_a_model_that_cannot_go_on_from_a_prefix_runs_without_kvmp(engines: Engines) -> None:
    engine = engines.pooler.wait_up()
    assert engine.embed(PROMPT) != engine.embed(PROMPT + PROMPT)
    assert "kvmp is switched off: vLLM's prefix caching is off" in engine.log_path.read_text()
