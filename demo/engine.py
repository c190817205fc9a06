"""The owner's side of a real vLLM engine: start it, ask it, kill it.

starting -> up -> stopped | killed. The engine's processes are a session of their own, so that a kill reaches all.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .engine_config import EngineConfig
from .processes import Process, processes_of_session

ROOT = Path(__file__).resolve().parent.parent
START_S = 240.0
"""Bound for a start; beside another engine on two cores it takes a minute."""
ANSWER_S = 120.0
_LOG_LINES = 40

# Python's own child that removes shared memory and semaphores which killed processes left; it ends after them.
_RESOURCE_TRACKER = "multiprocessing.resource_tracker"
_TRACKER_S = 10.0


class EngineError(Exception):
    """The engine died or refused; with the last lines of its log."""


@dataclass(frozen=True)
class Output:
    """What one request brought."""

    tokens: list[int]
    cached_tokens: int
    """Prompt tokens that were not computed: found in the engine's own cache or in kvmp."""
    ttft_s: float | None
    """Seconds from the request to its first token; None when it was aborted before."""
    finish: str
    """vLLM's finish reason: ``length``, ``abort``, ``error``."""


@dataclass(frozen=True)
class Pending:
    """A request under way."""

    request: str
    _answer: "Future[dict[str, Any]]"

    def result(self, timeout_s: float = ANSWER_S) -> Output:
        return Output(**self._answer.result(timeout_s))

    def done(self) -> bool:
        return self._answer.done()


class Engine:
    """A real vLLM engine in processes of its own; ``with`` kills whatever is left of it."""

    def __init__(self, config: EngineConfig, log: Path):
        self.config = config
        self.log_path = log
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._up: Future[dict[str, Any]] = Future()
        self._waiting: dict[int, Future[dict[str, Any]]] = {0: self._up}
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "demo.engine_process", config.to_json()],
                cwd=ROOT,
                env={**os.environ, **config.environment()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_answers, name="engine-answers", daemon=True)
        self._reader.start()

    def wait_up(self, timeout_s: float = START_S) -> Self:
        """Return once the engine takes requests."""
        try:
            self._up.result(timeout_s)
        except TimeoutError:
            raise EngineError(f"the engine was not up within {timeout_s} s:\n{self.log_tail()}") from None
        return self

    # ---- requests

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 16,
        *,
        salt: str | None = None,
        adapter: str | None = None,
        adapter_edition: int = 0,
    ) -> Pending:
        """Start a request with greedy sampling; any number may be under way.

        ``adapter``: folder of a LoRA adapter, whose name is the folder's; vLLM reads it once an ``adapter_edition``.
        """
        request = f"request-{next(self._numbers)}"
        lora = [adapter, adapter_edition] if adapter else None
        answer = self._ask("submit", request=request, prompt=prompt, max_tokens=max_tokens, salt=salt, adapter=lora)
        return Pending(request, answer)

    def generate(self, prompts: list[list[int]], max_tokens: int = 16) -> list[Output]:
        """All prompts at once, batched as the engine likes."""
        return [pending.result() for pending in [self.submit(prompt, max_tokens) for prompt in prompts]]

    def embed(self, prompt: list[int]) -> list[float]:
        """The embedding of the prompt, by a model that makes such."""
        answer = self._ask("embed", request=f"request-{next(self._numbers)}", prompt=prompt)
        return answer.result(ANSWER_S)["embedding"]

    def abort(self, pending: Pending) -> None:
        self._ask("abort", request=pending.request).result(ANSWER_S)

    def reset(self, *, connector: bool = False) -> bool:
        """Empty the engine's own prefix cache, and with ``connector`` tell the connector so."""
        return bool(self._ask("reset", connector=connector).result(ANSWER_S)["done"])

    def pause(self) -> None:
        """Pause as for a weight update, which aborts what runs and empties every cache, and go on."""
        self._ask("pause").result(ANSWER_S)

    def counters(self) -> dict[str, int]:
        """vLLM's own, without their prefix (``num_preemptions``), and the connector's (``kvmp_loaded_blocks``)."""
        return self._ask("counters").result(ANSWER_S)["counters"]

    # ---- life and death

    def processes(self) -> list[Process]:
        """Every process of the engine now, by title: ``VLLM::EngineCore``, ``VLLM::Worker_TP0``, ..."""
        return processes_of_session(self.process.pid)

    def process_named(self, title: str) -> Process:
        """The one whose title starts like that."""
        (found,) = [process for process in self.processes() if process.title.startswith(title)]
        return found

    def kill(self) -> None:
        """SIGKILL every process at once, as a lost container would; shared memory that they leave is cleaned up."""
        while left := [process for process in self.processes() if _RESOURCE_TRACKER not in process.title]:
            for process in left:
                process.signal(signal.SIGKILL)
            self.process.wait()
        self.process.wait()  # also one that ended by itself
        self._await_resource_tracker()
        self._reader.join()
        self._close_pipes()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Let vLLM shut down by itself; kill what is left after that."""
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(timeout_s)
        self.kill()

    def log_tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    # ---- the line to the process

    def _ask(self, verb: str, **arguments: Any) -> "Future[dict[str, Any]]":
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = answer
            try:
                self.process.stdin.write(json.dumps({"id": number, "do": verb, **arguments}).encode() + b"\n")
                self.process.stdin.flush()
            except (BrokenPipeError, ValueError):
                del self._waiting[number]
                raise EngineError(f"the engine is gone:\n{self.log_tail()}") from None
        return answer

    def _read_answers(self) -> None:
        for line in self.process.stdout:
            answer = json.loads(line)
            with self._lock:
                waiting = self._waiting.pop(answer.pop("id"))
            if "error" in answer:
                waiting.set_exception(EngineError(answer["error"]))
            else:
                waiting.set_result(answer)
        with self._lock:
            left, self._waiting = list(self._waiting.values()), {}
        for waiting in left:
            waiting.set_exception(EngineError(f"the engine ended:\n{self.log_tail()}"))

    def _await_resource_tracker(self) -> None:
        deadline = time.monotonic() + _TRACKER_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in left:
            process.signal(signal.SIGKILL)

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
