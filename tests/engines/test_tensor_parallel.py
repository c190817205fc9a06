"""Two ranks, each with a part of every block: a block is found only when both parts are committed."""

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, Reference, await_blocks, loaded_tokens, random_prompt, stats

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


def _right(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference.tokens(prompt) for prompt in prompts]
