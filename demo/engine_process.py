"""The process of one real vLLM engine, driven by JSON lines: `python -m demo.engine_process CONFIG`.

In: `{"id", "do": VERB, ...}`, one a line, of the verbs in `_commands`; end of input ends the engine.
Out: `{"id", ...answer}` or `{"id", "error"}`, in any order; first of all `{"id": 0}`, once the engine is up.
Whatever vLLM and its children print goes to stderr.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .engine_config import EngineConfig


class EngineProcess:
    """Commands of one owner, carried out on one engine as they come."""

    def __init__(self, config: EngineConfig, answers: int):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(**config.vllm_args())
        self._engine = AsyncLLM.from_engine_args(args)
        self._answers = answers
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._adapters: dict[tuple[str, int], int] = {}
        self._commands = {
            "submit": self._submit,
            "embed": self._embed,
            "abort": self._abort,
            "counters": self._counters,
            "reset": self._reset,
            "pause": self._pause,
        }

    async def serve(self) -> None:
        """Carry out commands until the owner closes its end."""
        self._say({"id": 0})
        running = set()
        async for line in _lines(sys.stdin):
            task = asyncio.create_task(self._carry_out(json.loads(line)))
            running.add(task)
            task.add_done_callback(running.discard)
        self._engine.shutdown()

    async def _carry_out(self, command: dict[str, Any]) -> None:
        number, verb = command.pop("id"), command.pop("do")
        try:
            answer = await self._commands[verb](**command)
        except Exception as error:  # whatever went wrong is the owner's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._say({"id": number, **answer})

    async def _submit(
        self, request: str, prompt: list[int], max_tokens: int, salt: str | None = None, adapter: Any = None
    ) -> dict[str, Any]:
        self._requests[request] = asyncio.current_task()
        started, first_at, output = time.perf_counter(), None, None
        with suppress(asyncio.CancelledError):
            async for partial in self._generate(request, prompt, max_tokens, salt, adapter):
                output, first_at = partial, first_at or time.perf_counter()
        return {
            "tokens": list(output.outputs[0].token_ids) if output else [],
            "cached_tokens": (output.num_cached_tokens or 0) if output else 0,
            "ttft_s": first_at - started if first_at else None,
            "finish": (output.outputs[0].finish_reason if output else None) or "abort",
        }

    async def _embed(self, request: str, prompt: list[int]) -> dict[str, Any]:
        from vllm import PoolingParams

        async for output in self._engine.encode({"prompt_token_ids": prompt}, PoolingParams(task="embed"), request):
            embedding = output.outputs.data.tolist()
        return {"embedding": embedding}

    def _generate(
        self, request: str, prompt: list[int], max_tokens: int, salt: str | None, adapter: Any
    ) -> AsyncIterator[Any]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        return self._engine.generate(inputs, params, request, lora_request=self._adapter(adapter))

    def _adapter(self, lora: Any) -> Any:
        """vLLM's request for the LoRA adapter [folder, edition]: numbered in the order of first use."""
        if lora is None:
            return None
        from vllm.lora.request import LoRARequest

        folder, edition = lora
        number = self._adapters.setdefault((folder, edition), len(self._adapters) + 1)
        return LoRARequest(Path(folder).name, number, folder)

    async def _abort(self, request: str) -> dict[str, Any]:
        self._requests[request].cancel()  # as vLLM's HTTP server does when its client hangs up
        return {}

    async def _counters(self) -> dict[str, Any]:
        from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

        totals: dict[str, int] = {}
        for metric in get_metrics_snapshot():
            name = metric.name.removeprefix("vllm:")
            if isinstance(metric, Counter):
                totals[name] = totals.get(name, 0) + int(metric.value)
            elif isinstance(metric, Gauge) and name.startswith("kvmp_"):
                totals[name] = int(metric.value)
        return {"counters": totals}

    async def _reset(self, connector: bool = False) -> dict[str, Any]:
        return {"done": await self._engine.reset_prefix_cache(reset_connector=connector)}

    async def _pause(self) -> dict[str, Any]:
        await self._engine.pause_generation(mode="abort", clear_cache=True)
        await self._engine.resume_generation()
        return {}

    def _say(self, answer: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")


async def _lines(stream: Any) -> AsyncIterator[str]:
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    while line := await reader.readline():
        yield line.decode()


def _own_stdout() -> int:
    """The answers' descriptor, kept from children; print() and C code go to stderr from now on."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


async def _main() -> None:
    answers = _own_stdout()
    await EngineProcess(EngineConfig.from_json(sys.argv[1]), answers).serve()


if __name__ == "__main__":
    asyncio.run(_main())
