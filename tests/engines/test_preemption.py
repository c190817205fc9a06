"""An engine whose own cache is too small for its requests: it preempts, and what it resumes comes from kvmp."""

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, Reference, loaded_tokens, random_prompt, stats, until

NEW = 60
ROUNDS = 3


def test_preempted_requests_end_with_the_right_tokens(start_engine: StartEngine, reference: Reference) -> None:
    prompts = [random_prompt(f"preempted {number}", 2 * BLOCK + 1) for number in range(6)]
    with kvmp.launch("64MiB") as server:
        # A bound missed on a busy machine would cost a store, or a hit.
        patient = {"kvmp.timeout_ms": 5000}
        engine = start_engine(endpoint=server.endpoint, kv_blocks=14, max_model_len=256, connector_config=patient)
        engine.wait_up()
        until(lambda: stats(server)["engines"], "attached")
        for number in range(ROUNDS):
            outputs = engine.generate(prompts, NEW)
            assert [output.tokens for output in outputs] == [reference.tokens(prompt, NEW) for prompt in prompts]
            if number == 0:  # what was loaded, for prompts that nobody has asked for before, was for one resumed
                counters = engine.counters()
                assert counters["num_preemptions"] > 0
                assert counters["kvmp_loaded_blocks"] > 0
        assert loaded_tokens(engine) > 0  # vLLM's count, which leaves those resumed out
        until(lambda: stats(server)["blocks_writing"] == 0, "no store left open")
