"""An arena so small that it evicts all the time: fewer hits, the same tokens."""

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    await_backing,
    forget,
    loaded_tokens,
    random_prompt,
    stats,
)

PROMPT_TOKENS = 8 * BLOCK + 3
ROUNDS = 3


def test_tokens_are_right_while_everything_is_evicted(start_engine: StartEngine, reference: Reference) -> None:
    prompts = [random_prompt(f"evicted {number}", PROMPT_TOKENS) for number in range(8)]
    with kvmp.launch("4MiB", chunk="2MiB") as server:  # 32 blocks of 128 KiB: half of what the prompts have
        engine = start_engine(endpoint=server.endpoint).wait_up()
        await_backing(server)
        for _ in range(ROUNDS):
            for prompt in prompts:
                for _ in range(2):  # the second time from kvmp, if the first was stored
                    (output,) = engine.generate([prompt], NEW_TOKENS)
                    assert output.tokens == reference.tokens(prompt)
                    forget(engine)
        assert stats(server)["evictions"] > len(prompts)
        assert loaded_tokens(engine) > 0
