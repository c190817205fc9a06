"""What the tests on real engines share: prompts, waits under a watchdog, the server's counters, the right tokens."""

import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import kvmp
from demo.engine import Engine
from demo.engine_config import EngineConfig, on_core
from demo.model import VOCABULARY

BLOCK = 32
NEW_TOKENS = 12
PAGE = 4096
WATCHDOG_S = 60.0


def random_prompt(seed: object, tokens: int) -> list[int]:
    """The same tokens for the same seed, in every run."""
    numbers = random.Random(str(seed))
    return [numbers.randrange(VOCABULARY) for _ in range(tokens)]


def until(condition: Callable[[], Any], what: str, timeout_s: float = WATCHDOG_S) -> Any:
    """The condition's first true value; a failure that names `what` if it never comes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)
    return value


def stats(server: kvmp.Server) -> dict[str, Any]:
    """The server's counters now."""
    with closing(kvmp.Client.connect(server.endpoint, role="tool", timeout_ms=5000)) as client:
        return client.stats()


def await_blocks(server: kvmp.Server, blocks: int) -> None:
    """Return once so many blocks are committed and nobody writes one."""

    def settled() -> bool:
        now = stats(server)
        return now["blocks_ready"] >= blocks and now["blocks_writing"] == 0

    until(settled, f"{blocks} blocks committed")


def await_backing(server: kvmp.Server) -> None:
    """Return once the whole arena can be granted."""
    until(lambda: not stats(server)["warming"], "the arena backed")


def forget(engine: Engine) -> None:
    """Empty the engine's own prefix cache, so that the next hit can only come from kvmp."""
    until(engine.reset, "the engine's own cache emptied, nothing pinned any more")


def loaded_tokens(engine: Engine) -> int:
    """Tokens that the connector brought, by vLLM's own count."""
    return engine.counters().get("external_prefix_cache_hits", 0)


def spoil(segment: Path, before: np.ndarray) -> None:
    """Turn round the values of the arena pages that were written since `before`, and nothing else."""
    now = np.memmap(segment, np.uint8, mode="r+").reshape(-1, PAGE)
    written = np.flatnonzero((now != before.reshape(-1, PAGE)).sum(axis=1) > PAGE // 2)
    assert written.size
    now[written] = now[written][:, ::-1].reshape(-1, PAGE // 4, 4)[:, :, ::-1].reshape(-1, PAGE)


class Reference:
    """An engine without kvmp and without a prefix cache, started at the first question."""

    def __init__(self, model: str, log: Path):
        self._config = EngineConfig(model, engine_args={"enable_prefix_caching": False}, env=on_core(-1))
        self._log = log
        self._engine: Engine | None = None
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def tokens(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        """The greedy tokens that follow the prompt."""
        key = (tuple(prompt), new_tokens)
        if key not in self._known:
            self._known[key] = self._started().generate([prompt], new_tokens)[0].tokens
        return self._known[key]

    def _started(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(self._config, self._log)
        return self._engine.wait_up()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.kill()
