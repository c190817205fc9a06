"""A real vLLM engine on GPUs, run by loading.py as ``python tests/gpu/engine.py JSON``: ``{"endpoint", "llm"}``.

``endpoint`` is kvmp's server, ``llm`` what `vllm.LLM` is given besides. Many prompts at once are computed and stored;
then the GPUs forget and spoil all their blocks, and the same prompts come again. Prints one line of JSON: what was
stored and loaded, and on each rank which blocks have other bytes than those that were computed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PROMPTS = 24
WATCHDOG_S = 60.0


def start(endpoint: str, arguments: dict[str, Any]) -> Any:
    """A small model, with CUDA graphs and asynchronous scheduling as they are by default."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="ProbedConnector",
        kv_connector_module_path="probe",
        kv_role="kv_both",
        # What is shown is which bytes come, not how fast.
        kv_connector_extra_config={"kvmp.endpoint": endpoint, "kvmp.timeout_ms": 5000},
    )
    return LLM(
        skip_tokenizer_init=True,
        max_model_len=4096,
        kv_transfer_config=transfer,
        enable_prefix_caching=True,
        num_gpu_blocks_override=4096,
        max_num_batched_tokens=2048,
        max_num_seqs=32,
        gpu_memory_utilization=0.3,
        **arguments,
    )


class Engine:
    """The engine, its core's own calls, and the server's counters."""

    def __init__(self, endpoint: str, arguments: dict[str, Any]):
        from kvmp.client import Client

        self.llm = start(endpoint, arguments)
        self.ranks = arguments.get("tensor_parallel_size", 1)
        self.tool = Client.connect(endpoint, role="tool", timeout_ms=5000)

    def core(self, method: str) -> Any:
        return self.llm.llm_engine.engine_core.call_utility(method)

    def each_rank(self, call: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self.llm.collective_rpc(call, args=arguments)

    def counters(self) -> dict[str, Any]:
        """The server's."""
        return self.tool.stats(timeout_ms=5000)

    def generate(self, prompts: list[list[int]]) -> list[Any]:
        from vllm import SamplingParams

        few = SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True)
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], few, use_tqdm=False)

    def await_joined(self) -> None:
        """Returns once a block was stored and every rank has a session; the first stores may come before that."""

        rng = random.Random(2)

        def joined() -> bool:
            self.generate([tokens(rng, 300)])
            now = self.counters()
            # The scheduler's, the ranks' and ours.
            return now["blocks_ready"] > 0 and now["sessions"] == self.ranks + 2

        until("every rank stores or loads", joined)
        self.await_stored()

    def await_stored(self) -> None:
        """Returns once nothing is being stored or loaded any more."""
        until("the stores have ended", lambda: not self.core("kvmp_pending"))

    def forget(self) -> None:
        """Empties the GPUs' own cache; what is pinned for a store makes a try fail."""
        until("the GPU's cache is emptied", self.llm.reset_prefix_cache)


def until(what: str, holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WATCHDOG_S
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 30000) for _ in range(count)]


def main(endpoint: str, arguments: dict[str, Any]) -> None:
    sys.path.insert(0, str(FOLDER))
    os.environ["PYTHONPATH"] = f"{FOLDER}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for functions of `probe` as calls
    import probe

    engine, rng = Engine(endpoint, arguments), random.Random(1)
    engine.each_rank(probe.count_replays)
    [block, *_] = [fact["block_tokens"] for fact in engine.each_rank(probe.facts)]
    engine.await_joined()
    # Never whole blocks: of a prompt that is found whole the last token is computed again, into its last block.
    lengths = [block * rng.randrange(320 // block, 3200 // block) + rng.randrange(1, block) for _ in range(PROMPTS)]
    prompts = [tokens(rng, length) for length in lengths]
    before = engine.counters()
    engine.generate(prompts)
    engine.await_stored()
    after = engine.counters()
    computed = engine.each_rank(probe.digests, engine.core("kvmp_cached_blocks"))
    engine.forget()
    left = engine.core("kvmp_cached_blocks")
    engine.each_rank(probe.poison)
    again = engine.generate(prompts)
    now = engine.each_rank(probe.digests, engine.core("kvmp_cached_blocks"))
    [namespace] = engine.tool.namespaces()
    result = {
        "block_tokens": block,
        "lengths": lengths,
        "cached_tokens": [output.num_cached_tokens for output in again],
        "left": len(left),
        "parts": len(namespace["spec"]["parts"]),
        "stored_parts": after["committed_parts"] - before["committed_parts"],
        "stored_blocks": after["committed_blocks"] - before["committed_blocks"],
        "steps_in_flight": engine.core("kvmp_steps_in_flight"),
        "ranks": [compared(rank, *bytes_of) for rank, bytes_of in enumerate(zip(computed, now, strict=True))],
        "as_on_rank_0": [sum(of[key] == computed[0][key] for key in of) for of in computed],
        "facts": engine.each_rank(probe.facts),
    }
    engine.tool.close()
    print("RESULT " + json.dumps(result), flush=True)


def compared(rank: int, computed: dict[str, str], now: dict[str, str]) -> dict[str, int]:
    """Of a rank: blocks computed, those of them unlike all others, those that came again, and differ."""
    again = now.keys() & computed.keys()
    return {
        "rank": rank,
        "computed": len(computed),
        "distinct": len(set(computed.values())),
        "again": len(again),
        "other_bytes": sum(now[key] != computed[key] for key in again),
    }


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    main(options["endpoint"], options["llm"])
