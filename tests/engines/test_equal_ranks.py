"""Two ranks of equal KV: each block is stored once, by the lower rank, and loaded by both."""

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

import kvmp
from demo.engine import Engine
from demo.model import HEAD_SIZE, LAYERS
from tests.engines.conftest import StartEngine
from tests.engines.gate import Gate
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    await_blocks,
    forget,
    loaded_tokens,
    random_prompt,
    stats,
    until,
)
from tests.engines.models import MAX_TOKENS, one_kv_head

BLOCKS = 10
# K and V in float32 of the one head: what either rank has of a block, and all that is stored of it.
BLOCK_BYTES = LAYERS * BLOCK * 2 * HEAD_SIZE * 4


@dataclass
class Scene:
    server: kvmp.Server
    engine: Engine
    """Its copies stop at the gate, which counts those of both ranks."""
    gate: Gate


@pytest.fixture(scope="module")
def scene(start_engine: StartEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("equal")
    gate = Gate(folder)
    with kvmp.launch("64MiB") as server:
        engine = start_engine(
            endpoint=server.endpoint,
            tensor_parallel=2,
            connector_module="tests.engines.held_copies",
            env=gate.environment,
            engine_args={"model": one_kv_head(folder / "model"), "max_model_len": MAX_TOKENS},
        ).wait_up()
        _warm_up(server, engine)
        yield Scene(server, engine, gate)
        gate.open()


def _warm_up(server: kvmp.Server, engine: Engine) -> None:
    """Return once both ranks have joined: on a busy machine a first try may miss its bound, and its store is lost."""

    def joined() -> bool:
        engine.generate([random_prompt("warm-up", BLOCK)], 1)
        now = stats(server)
        # Its scheduler, the writer, the reader, and the tool that asks.
        return now["blocks_ready"] == 1 and now["sessions"] == 4 and forget(engine) is None

    until(joined, "a block stored, and both ranks joined")


def test_one_rank_stores_and_both_load(scene: Scene) -> None:
    """The answers are those the engine gave while there was nothing to load."""
    server, engine, gate = scene.server, scene.engine, scene.gate
    prompts = [random_prompt(f"equal ranks {tokens}", tokens) for tokens in (2 * BLOCK, 5 * BLOCK + 1, 690)]
    blocks = sum(len(prompt) // BLOCK for prompt in prompts)
    before, loaded = stats(server), loaded_tokens(engine)
    gate.hold()
    gate.open()
    cold = [engine.generate([prompt], NEW_TOKENS)[0].tokens for prompt in prompts]
    assert loaded_tokens(engine) == loaded
    await_blocks(server, before["blocks_ready"] + blocks)
    now = stats(server)
    assert [now[key] - before[key] for key in ("committed_parts", "committed_blocks")] == [blocks, blocks]
    assert _parts(server) == [{"bytes": [BLOCK_BYTES]}]
    assert gate.passed("store") == blocks
    assert gate.passed("load") == 0
    forget(engine)
    assert [engine.generate([prompt], NEW_TOKENS)[0].tokens for prompt in prompts] == cold
    # A rank notes each block it copied; vLLM counts what both had loaded.
    found = sum((len(prompt) - 1) // BLOCK for prompt in prompts)
    assert loaded_tokens(engine) - loaded >= found * BLOCK
    assert gate.passed("load") == 2 * (loaded_tokens(engine) - loaded) // BLOCK
    # Other KV is another answer: what was loaded counted.
    other = [prompts[-1][0] + 1, *prompts[-1][1:]]
    assert engine.generate([other], NEW_TOKENS)[0].tokens != cold[-1]


def test_a_block_whose_writer_died_is_never_found(scene: Scene) -> None:
    """Killed between reserve and commit; the last test of the scene, as vLLM ends an engine that lost a rank."""
    server, engine, gate = scene.server, scene.engine, scene.gate
    until(lambda: not _open_slots(server), "no store open")
    forget(engine)
    before = stats(server)
    gate.hold()
    engine.submit(random_prompt("half stored", BLOCKS * BLOCK + 1), 500)
    until(lambda: gate.passed("store") == 1, "a block stored by the one rank that stores")
    assert stats(server)["blocks_writing"] == BLOCKS
    engine.process_named("VLLM::Worker_TP0").signal(signal.SIGKILL)
    gate.open()
    until(lambda: not _open_slots(server), "the slots free again")
    until(lambda: stats(server)["engines"] == 0, "the engine gone")
    now = stats(server)
    assert [now[key] - before[key] for key in ("blocks_ready", "committed_blocks", "committed_parts")] == [0, 0, 0]
    assert now["aborted_parts"] - before["aborted_parts"] == BLOCKS


def _parts(server: kvmp.Server) -> list[dict[str, Any]]:
    """The parts of a slot, their layouts left out."""
    with closing(kvmp.Client.connect(server.endpoint, role="tool", timeout_ms=5000)) as client:
        (namespace,) = client.namespaces()
    return [{"bytes": part["bytes"]} for part in namespace["spec"]["parts"]]


def _open_slots(server: kvmp.Server) -> int:
    """Slots that somebody may still be writing to."""
    now = stats(server)
    return now["blocks_writing"] + now["blocks_quarantined"]
