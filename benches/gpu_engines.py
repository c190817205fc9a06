"""Real vLLM engines with one connector each, several at once on one GPU, that do a round of work when they are asked.

started together -> each ready -> asked in turn, one at a time, the others idle -> killed. An engine takes one to two
minutes to start, which they do side by side; and a wandering clock is the same for all that are asked in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "head_dim": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# A trial of the bench itself, on a machine without a GPU.
TINY = LLAMA_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
    "head_dim": 64,
}
BLOCK_TOKENS = 16
LMCACHE_PORT = 5556
WARM_UP_TOKENS = 512
# All of a bout fit into the engine's own cache: one that preempts its requests would find them again in kvmp.
BOUT_PROMPTS, BOUT_TOKENS, BOUT_GENERATED = 18, 2048, 32
# Seconds after a bout in which its last stores end, which would slow the next one's engine.
BOUT_REST_S = 0.3
# Rooms in units of documents; `floor` has no connector and room for all.
ROOM, FLOOR_ROOM = 2.5, 8


@dataclass(frozen=True)
class Workload:
    """What every engine of a run is asked for.

    Attributes:
        tokens: of a document.
        documents: in a round.
        cache_gib: size of a connector's host memory, GiB.
        eager: without CUDA graphs.
        tiny: a small model, for a trial on a CPU.
        memory_share: of the GPU's memory, of each engine.
        limit_s: for a start, or for a round.
    """

    tokens: int
    documents: int
    cache_gib: int
    eager: bool
    tiny: bool
    memory_share: float
    limit_s: float

    @property
    def model(self) -> dict[str, Any]:
        """The model's configuration."""
        return TINY if self.tiny else LLAMA_8B

    @property
    def kv_bytes_a_token(self) -> int:
        """K and V, two bytes an element."""
        model = self.model
        return 2 * 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"]


def connector_of(mode: str, work: Workload) -> tuple[str, dict[str, Any]] | None:
    """The connector's name and settings; None for an engine without one."""
    size = work.cache_gib << 30
    return {
        "none": None,
        "floor": None,
        "kvmp": ("KvmpConnector", {}),
        "offloading": ("OffloadingConnector", {"cpu_bytes_to_use": size}),
        "simple": ("SimpleCPUOffloadConnector", {"cpu_bytes_to_use": size}),
        "lmcache": ("LMCacheMPConnector", {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": LMCACHE_PORT}),
    }[mode]


MODES = ("none", "floor", "kvmp", "offloading", "simple", "lmcache")


# The process of one engine.


def _engine(mode: str, work: Workload) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    folder = Path(tempfile.gettempdir(), "kvmp-bench-tiny" if work.tiny else "kvmp-bench-llama8b")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(work.model))
    connector, transfer = connector_of(mode, work), None
    if connector is not None:
        name, extra = connector
        transfer = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra)
    room = int(work.tokens * (FLOOR_ROOM if mode == "floor" else ROOM))
    blocks = max(room, BOUT_PROMPTS * (BOUT_TOKENS + BOUT_GENERATED)) // BLOCK_TOKENS
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=work.eager,
        max_model_len=max(work.tokens, BOUT_TOKENS) + 64,
        kv_transfer_config=transfer,
        enable_prefix_caching=True,
        num_gpu_blocks_override=blocks,
        # With the size given vLLM does not measure what is free, which other engines take just then.
        kv_cache_memory_bytes=(blocks + 1) * BLOCK_TOKENS * work.kv_bytes_a_token,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=work.memory_share,
    )


class _Rounds:
    """What an engine can be asked for."""

    def __init__(self, mode: str, work: Workload):
        from vllm import SamplingParams

        self._llm, self._work, self._rng = _engine(mode, work), work, random.Random(1)
        self._documents = [self._tokens(work.tokens) for _ in range(work.documents)]
        self._one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self._few = SamplingParams(temperature=0, max_tokens=BOUT_GENERATED, detokenize=False, ignore_eos=True)
        self._llm.generate([self._prompt(self._tokens(WARM_UP_TOKENS))], self._one, use_tqdm=False)

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(10, self._work.model["vocab_size"] - 10) for _ in range(count)]

    @staticmethod
    def _prompt(tokens: list[int]) -> dict[str, Any]:
        return {"prompt_token_ids": tokens}

    def first_tokens(self) -> dict[str, Any]:
        """Milliseconds to the first token of each document, one after the other, and the share that was hit."""
        times, hit = [], 0
        for document in self._documents:
            begun = time.perf_counter()
            [output] = self._llm.generate([self._prompt(document)], self._one, use_tqdm=False)
            times.append((time.perf_counter() - begun) * 1e3)
            hit += output.num_cached_tokens or 0
        return {"ms": times, "hit": hit / (self._work.tokens * self._work.documents)}

    def bout(self) -> float:
        """Tokens a second of prompts that were never seen before."""
        prompts = [self._prompt(self._tokens(BOUT_TOKENS)) for _ in range(BOUT_PROMPTS)]
        begun = time.perf_counter()
        self._llm.generate(prompts, self._few, use_tqdm=False)
        took = time.perf_counter() - begun
        time.sleep(BOUT_REST_S)
        return BOUT_PROMPTS * (BOUT_TOKENS + BOUT_GENERATED) / took


def _serve(pipe: Connection, mode: str, work: Workload, log: str) -> None:
    os.setsid()
    with open(log, "wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    rounds = _Rounds(mode, work)
    pipe.send("ready")
    while True:
        pipe.send(getattr(rounds, pipe.recv())())


# Many of them.


class Engine:
    """An engine in a process of its own."""

    def __init__(self, mode: str, work: Workload, folder: Path):
        self.mode = mode
        self._limit_s, self._log = work.limit_s, folder / f"{mode}.log"
        self._pipe, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_serve, args=(theirs, mode, work, str(self._log)))
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it says next.

        Raises:
            RuntimeError: it has ended, or says nothing for `limit_s`; with the end of its log.
        """
        try:
            if self._pipe.poll(self._limit_s):
                return self._pipe.recv()
            what = f"nothing in {self._limit_s:.0f} s"
        except (EOFError, ConnectionError):
            what = "it has ended"
        raise RuntimeError(f"{self.mode}: {what}\n{self._log.read_text(errors='replace')[-3000:]}")

    def ask(self, what: str) -> Any:
        """The result of one of `_Rounds`' methods."""
        self._pipe.send(what)
        return self.answer()

    def close(self) -> None:
        """Kills it and the processes it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextmanager
def engines(modes: list[str], work: Workload) -> Iterator[list[Engine]]:
    """Starts an engine and, where it wants one, a server a mode; those that come up. What went wrong goes to stderr."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, started = Path(name), []
        for mode in modes:
            with _reported():
                stack.enter_context(_server(mode, work, folder / f"{mode}-server.log"))
                started.append(Engine(mode, work, folder))
                stack.callback(started[-1].close)
        yield [engine for engine in started if _is_up(engine)]


def _is_up(engine: Engine) -> bool:
    with _reported():
        engine.answer()
        return True
    return False


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)


def _server_command(mode: str, work: Workload) -> list[str]:
    """The server that a mode's connector wants; none for most."""
    if mode == "kvmp":
        return [sys.executable, "-m", "kvmp", "serve", "--size", f"{work.cache_gib}GiB", "--ephemeral"]
    if mode == "lmcache":
        lmcache = [sys.executable, "-m", "lmcache.cli.main", "server", "--port", str(LMCACHE_PORT)]
        return [*lmcache, "--l1-size-gb", str(work.cache_gib), "--eviction-policy", "LRU"]
    return []


@contextmanager
def _server(mode: str, work: Workload, log: Path) -> Iterator[None]:
    command = _server_command(mode, work)
    if not command:
        yield
        return
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            _wait_ready(mode, log, process)
            yield
        finally:
            process.terminate()
            process.wait(30)


def _wait_ready(mode: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    # LMCache's says nothing that would not be another release's wording. Its engine takes longer to start than it.
    until = time.monotonic() + 5
    while "are backed" not in log.read_text() if mode == "kvmp" else time.monotonic() < until:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{mode}: the server is not ready: {log.read_text()[-1500:]}")
        time.sleep(0.1)
