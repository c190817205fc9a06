"""The suite's negative control: with loads that bring zeros, the comparisons that the other tests make must fail."""

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, Reference, await_blocks, forget, random_prompt


def test_zeros_for_kv_give_other_tokens(start_engine: StartEngine, reference: Reference) -> None:
    prompts = [random_prompt(f"zeros {blocks}", blocks * BLOCK + 1) for blocks in (1, 3, 10)]
    with kvmp.launch("64MiB") as server:
        engine = start_engine(endpoint=server.endpoint, connector_module="tests.engines.zero_loads").wait_up()
        engine.generate(prompts, 1)
        await_blocks(server, 14)
        forget(engine)
        for prompt, output in zip(prompts, engine.generate(prompts, NEW_TOKENS), strict=True):
            assert output.cached_tokens == len(prompt) - 1
            assert output.tokens != reference.tokens(prompt)
