"""kvmp in a MultiConnector, beside a connector whose loads fail: what was computed from them is not found later."""

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, Reference, await_blocks, forget, loaded_tokens, random_prompt

TOKENS = 5 * BLOCK + 1


def children(endpoint: str) -> dict[str, object]:
    ours = {
        "kv_connector": "KvmpConnector",
        "kv_connector_module_path": "kvmp.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvmp.endpoint": endpoint},
    }
    other = {
        "kv_connector": "FailsToLoad",
        "kv_connector_module_path": "tests.engines.fails_to_load",
        "kv_role": "kv_both",
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [other, ours]},
    }


def test_nothing_is_stored_of_what_another_connector_failed_to_load(
    start_engine: StartEngine, reference: Reference
) -> None:
    prompts = [random_prompt(f"beside {number}", TOKENS) for number in range(4)]
    # Its first blocks are another's, that it finds in the engine's cache in the step that fails to load them.
    prompts.append(prompts[0][: 2 * BLOCK] + random_prompt("beside, after", 3 * BLOCK + 1))
    with kvmp.launch("64MiB") as server:
        config = {
            "kv_transfer_config": children(server.endpoint),
            "disable_hybrid_kv_cache_manager": True,
            # Not all of a prompt is computed anew in one step: what is stored too early is not mended by then.
            "max_num_batched_tokens": 3 * BLOCK,
        }
        engine = start_engine(engine_args=config).wait_up()
        for prompt, output in zip(prompts, engine.generate(prompts, NEW_TOKENS), strict=True):
            assert output.tokens == reference.tokens(prompt), "vLLM itself computes anew what failed"
        assert loaded_tokens(engine) > 0, "the other connector claimed nothing"
        await_blocks(server, 4 * 5 + 3)
        forget(engine)
        for prompt, output in zip(prompts, engine.generate(prompts, NEW_TOKENS), strict=True):
            assert output.cached_tokens == TOKENS - 1
            assert output.tokens == reference.tokens(prompt)
