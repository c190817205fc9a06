"""An engine whose own cache is too small for its requests: it preempts, and what it resumes comes from kvmp."""

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, Reference, loaded_tokens, random_prompt, stats, until

NEW = 60
ROUNDS = 3


def test_preempted_requests_end_with_the_right_tokens(start_engine: StartEngine, reference: Reference) -> None:
    prompts = [random_prompt(f"preempted {number}", 2 * BLOCK + 1) for number in range(6)]
    with kvmp.launch("64MiB") as server:
        engine = start_engine(endpoint=server.endpoint, kv_blocks=14, max_model_len=256).wait_up()
        for _ in range(ROUNDS):
            outputs = engine.generate(prompts, NEW)
            assert [output.tokens for output in outputs] == [reference.tokens(prompt, NEW) for prompt in prompts]
        assert engine.counters()["num_preemptions"] > 0
        assert loaded_tokens(engine) > 0
        until(lambda: stats(server)["blocks_writing"] == 0, "no store left open")
