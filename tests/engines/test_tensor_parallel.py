"""Two ranks, each with a part of every block: a block is found only when both parts are committed."""

import signal
from pathlib import Path

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.gate import Gate
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    await_blocks,
    loaded_tokens,
    random_prompt,
    stats,
    until,
)

TWO_RANKS = {"tensor_parallel": 2}


def test_a_second_engine_of_two_ranks_finds_what_the_first_stored(
    start_engine: StartEngine, reference: Reference
) -> None:
    prompts = [random_prompt(f"two ranks {tokens}", tokens) for tokens in (2 * BLOCK, 5 * BLOCK + 1, 1_000)]
    with kvmp.launch("128MiB") as server:
        first = start_engine(endpoint=server.endpoint, **TWO_RANKS).wait_up()
        assert [output.tokens for output in first.generate(prompts, NEW_TOKENS)] == _right(reference, prompts)
        blocks = sum(len(prompt) // BLOCK for prompt in prompts)
        await_blocks(server, blocks)
        assert stats(server)["committed_parts"] >= 2 * blocks
        first.kill()
        second = start_engine(endpoint=server.endpoint, **TWO_RANKS).wait_up()
        assert [output.tokens for output in second.generate(prompts, NEW_TOKENS)] == _right(reference, prompts)
        assert loaded_tokens(second) >= sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)


def test_a_block_of_which_one_rank_died_is_never_found(start_engine: StartEngine, tmp_path: Path) -> None:
    gate, blocks = Gate(tmp_path), 10
    with kvmp.launch("64MiB") as server:
        engine = start_engine(
            endpoint=server.endpoint,
            connector_module="tests.engines.held_copies",
            env=gate.environment,
            **TWO_RANKS,
        ).wait_up()
        gate.hold()
        engine.submit(random_prompt("half stored", blocks * BLOCK + 1), 500)
        until(lambda: gate.passed("store") == 2, "a block stored by each rank")
        assert stats(server)["blocks_writing"] == blocks
        engine.process_named("VLLM::Worker_TP1").signal(signal.SIGKILL)
        gate.open()
        # Whatever the other rank still commits, vLLM ends the engine, and with it every part is closed.
        until(lambda: stats(server)["engines"] == 0, "the engine gone")
        until(lambda: not stats(server)["blocks_writing"] + stats(server)["blocks_quarantined"], "the slots free again")
        now = stats(server)
        assert (now["blocks_ready"], now["committed_blocks"]) == (0, 0)
        assert now["committed_parts"] < 2 * blocks


def _right(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference.tokens(prompt) for prompt in prompts]
