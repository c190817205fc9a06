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
    until,
)

BLOCKS, SLOTS = 8, 32
ROUNDS = 3


def test_tokens_are_right_while_everything_is_evicted(start_engine: StartEngine, reference: Reference) -> None:
    prompts = [random_prompt(f"evicted {number}", BLOCKS * BLOCK + 3) for number in range(8)]
    with kvmp.launch("4MiB", chunk="2MiB") as server:  # 32 blocks of 128 KiB: half of what the prompts have
        # A bound missed on a busy machine would cost a hit, or a store.
        engine = start_engine(endpoint=server.endpoint, connector_config={"kvmp.timeout_ms": 5000}).wait_up()
        await_backing(server)
        until(lambda: stats(server)["engines"], "attached")
        for _ in range(ROUNDS):
            for prompt in prompts:
                for found in (0, BLOCKS * BLOCK):  # evicted since the round before, and stored a moment ago
                    before = loaded_tokens(engine)
                    (output,) = engine.generate([prompt], NEW_TOKENS)
                    assert output.tokens == reference.tokens(prompt)
                    assert loaded_tokens(engine) - before == found
                    forget(engine)
        now = stats(server)
        assert now["evictions"] == now["committed_blocks"] - SLOTS == ROUNDS * len(prompts) * BLOCKS - SLOTS
