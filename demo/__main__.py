"""Kill a vLLM engine and see the next one find its KV again: `make demo`.

Three engines on the same prompts, one after another: engine 1 with kvmp, killed by SIGKILL; engine 2 with kvmp; and one
without, whose tokens are the ones to match.
"""

import random
import signal
import sys
import time
from contextlib import closing

import kvmp

from .engine import ROOT, Engine, Output
from .engine_config import EngineConfig
from .model import VOCABULARY, ensure_model
from .progress import step
from .table import Row, render

_FOLDER = ROOT / ".demo"
_PROMPT_TOKENS = (4_000, 4_600, 5_200, 6_000)
_NEW_TOKENS = 16
_COMMIT_S = 60.0


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _FOLDER.mkdir(exist_ok=True)
    prompts = [_random_prompt(f"prompt {tokens}", tokens) for tokens in _PROMPT_TOKENS]
    with step("making a tiny Llama"):
        model = str(ensure_model(_FOLDER / "model"))
    with kvmp.launch("512MiB") as server:
        print(f"  kvmp serve is up: pid {server.pid}, {server.endpoint}")
        cold = _run("engine 1", EngineConfig(model, endpoint=server.endpoint), prompts, server)
        found = _run("engine 2", EngineConfig(model, endpoint=server.endpoint), prompts)
    recomputed = _run("engine without kvmp", EngineConfig(model), prompts)
    rows = [Row(*of_prompt) for of_prompt in zip(prompts, cold, recomputed, found, strict=True)]
    print(f"\n{render(rows)}\n")
    return _verdict(rows)


def _run(name: str, config: EngineConfig, prompts: list[list[int]], server: kvmp.Server | None = None) -> list[Output]:
    """Each prompt by itself, after one that warms the engine up; then SIGKILL, once `server` has the prompts' KV."""
    with Engine(config, log=_FOLDER / f"{name.replace(' ', '-')}.log") as engine:
        with step(f"{name}: starting vLLM"):
            engine.wait_up()
        with step(f"{name}: {len(prompts)} prompts, {_NEW_TOKENS} tokens each"):
            engine.generate([_random_prompt(name, _PROMPT_TOKENS[0])], _NEW_TOKENS)
            outputs = [engine.generate([prompt], _NEW_TOKENS)[0] for prompt in prompts]
        if server is not None:
            _await_commits(server, prompts, config.block_tokens)
        engine.kill()
        print(f"  {name}: killed (SIGKILL to every process)")
    return outputs


def _random_prompt(seed: str, tokens: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(tokens)]


def _await_commits(server: kvmp.Server, prompts: list[list[int]], block_tokens: int) -> None:
    """Return once every whole block of the prompts is committed; stores run behind the engine's steps."""
    wanted = sum(len(prompt) // block_tokens for prompt in prompts)
    deadline = time.monotonic() + _COMMIT_S
    with step("waiting for the last blocks"), closing(kvmp.Client.connect(server.endpoint, role="tool")) as client:
        while not _all_committed(stats := client.stats(), wanted):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{wanted} blocks not committed within {_COMMIT_S} s; the server says {stats}")
            time.sleep(0.05)
    print(f"  kvmp holds {stats['blocks_ready']:,} blocks of {block_tokens} tokens")


def _all_committed(stats: dict[str, int | str], wanted: int) -> bool:
    return stats["blocks_ready"] >= wanted and stats["blocks_writing"] == 0


def _verdict(rows: list[Row]) -> int:
    """The exit code: 0 only if every prompt was found and every token is right."""
    if not all(row.equal for row in rows):
        print("FAILED: tokens differ from those of the engine without kvmp", file=sys.stderr)
        return 1
    if not all(row.found.cached_tokens for row in rows):
        print("FAILED: engine 2 found nothing of a prompt in kvmp", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
