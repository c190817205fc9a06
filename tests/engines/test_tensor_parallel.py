"""Two ranks, each with a part of every block: a block is found only when both parts are committed."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvmp
from demo.engine import Engine
from tests.engines.conftest import StartEngine
from tests.engines.gate import Gate
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    await_blocks,
    forget,
    loaded_tokens,
    random_prompt,
    stats,
    until,
)

TWO_RANKS = {"tensor_parallel": 2}


@dataclass
class Pair:
    """Engines of two ranks on one server; the second is the one that lasts."""

    server: kvmp.Server
    second: Engine | None = None


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with kvmp.launch("128MiB") as server:
        yield Pair(server)


def test_a_second_engine_of_two_ranks_finds_what_the_first_stored(
    start_engine: StartEngine, reference: Reference, pair: Pair
) -> None:
    prompts = [random_prompt(f"two ranks {tokens}", tokens) for tokens in (2 * BLOCK, 5 * BLOCK + 1, 1_000)]
    first = start_engine(endpoint=pair.server.endpoint, **TWO_RANKS).wait_up()
    assert [output.tokens for output in first.generate(prompts, NEW_TOKENS)] == _right(reference, prompts)
    blocks = sum(len(prompt) // BLOCK for prompt in prompts)
    await_blocks(pair.server, blocks)
    assert stats(pair.server)["committed_parts"] >= 2 * blocks
    first.kill()
    pair.second = start_engine(endpoint=pair.server.endpoint, **TWO_RANKS).wait_up()
    assert [output.tokens for output in pair.second.generate(prompts, NEW_TOKENS)] == _right(reference, prompts)
    assert loaded_tokens(pair.second) >= sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)


def test_a_block_of_which_one_rank_died_is_never_found(
    start_engine: StartEngine, reference: Reference, pair: Pair, tmp_path: Path
) -> None:
    """And the engine beside it goes on: it computes what was half stored, stores it, and finds that."""
    gate, blocks = Gate(tmp_path), 10
    prompt = random_prompt("half stored", blocks * BLOCK + 1)
    second = pair.second or start_engine(endpoint=pair.server.endpoint, **TWO_RANKS).wait_up()
    engine = start_engine(
        endpoint=pair.server.endpoint,
        connector_module="tests.engines.held_copies",
        env=gate.environment,
        **TWO_RANKS,
    ).wait_up()
    before = stats(pair.server)
    gate.hold()
    engine.submit(prompt, 500)
    until(lambda: gate.passed("store") == 2, "a block stored by each rank")
    assert stats(pair.server)["blocks_writing"] == blocks
    engine.process_named("VLLM::Worker_TP1").signal(signal.SIGKILL)
    gate.open()
    # Whatever the other rank still commits, vLLM ends the engine, and with it every part is closed.
    until(lambda: stats(pair.server)["engines"] == 1, "the engine gone")
    until(lambda: not _open_slots(pair.server), "the slots free again")
    now = stats(pair.server)
    assert [now[key] - before[key] for key in ("blocks_ready", "committed_blocks")] == [0, 0]
    assert now["committed_parts"] - before["committed_parts"] < 2 * blocks
    for found in (0, blocks * BLOCK):
        loaded = loaded_tokens(second)
        (output,) = second.generate([prompt], NEW_TOKENS)
        assert output.tokens == reference.tokens(prompt)
        assert loaded_tokens(second) - loaded == found
        until(lambda: not _open_slots(pair.server), "no store left open")
        forget(second)


def _open_slots(server: kvmp.Server) -> int:
    """Slots that somebody may still be writing to."""
    now = stats(server)
    return now["blocks_writing"] + now["blocks_quarantined"]


def _right(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference.tokens(prompt) for prompt in prompts]
