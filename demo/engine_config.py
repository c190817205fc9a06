"""What an engine of the harness is: given by its owner, sent to its process as JSON."""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from .model import MAX_TOKENS


@dataclass(frozen=True)
class EngineConfig:
    """One vLLM engine on the CPU."""

    model: str
    """Folder of the model."""
    endpoint: str | None = None
    """kvmp's server, ``unix:PATH`` or ``tcp://HOST:PORT``; None: an engine without kvmp."""
    block_tokens: int | None = 32
    """The CPU backend takes multiples of 32; None: what vLLM chooses."""
    max_model_len: int = MAX_TOKENS
    kv_bytes: int = 256 << 20
    """Memory of the engine's own KV cache, a rank."""
    kv_blocks: int | None = None
    """Blocks of the engine's own KV cache, where a test needs it small; takes the place of ``kv_bytes``."""
    tensor_parallel: int = 1
    dtype: str = "float32"
    connector_module: str = "kvmp.vllm.connector"
    """Where its ``KvmpConnector`` is; a test may have one that is wrong on purpose."""
    connector_config: dict[str, Any] = field(default_factory=dict)
    """More keys of ``kv_connector_extra_config``."""
    env: dict[str, str] = field(default_factory=dict)
    """More of its processes' environment."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """More of vLLM's ``EngineArgs``, which win over those made here."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineConfig":
        return cls(**json.loads(text))

    def vllm_args(self) -> dict[str, Any]:
        """Keywords for vLLM's ``EngineArgs``."""
        args: dict[str, Any] = {
            "model": self.model,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": self.dtype,
            "block_size": self.block_tokens,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_model_len,
            "kv_cache_memory_bytes": self.kv_bytes,
            "num_gpu_blocks_override": self.kv_blocks,
            "tensor_parallel_size": self.tensor_parallel,
            "disable_log_stats": False,
        }
        if self.endpoint is not None:
            args["kv_transfer_config"] = self._kv_transfer_config()
        return args | self.engine_args

    def _kv_transfer_config(self) -> dict[str, Any]:
        return {
            "kv_connector": "KvmpConnector",
            "kv_connector_module_path": self.connector_module,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"kvmp.endpoint": self.endpoint, **self.connector_config},
        }

    def environment(self) -> dict[str, str]:
        """What the engine's processes find in their environment, over their parent's."""
        return {
            "VLLM_CPU_OMP_THREADS_BIND": bindings(sorted(os.sched_getaffinity(0)), self.tensor_parallel),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.env,
        }


def bindings(cores: list[int], ranks: int) -> str:
    """Cores of each rank, as vLLM reads them: the same with a connector as without, so that times compare."""
    spare = 2 if len(cores) >= 4 + ranks else 0  # for the engine core and the copies, where there are enough
    usable = cores[: len(cores) - spare]
    return "|".join(",".join(map(str, usable[rank::ranks] or usable[:1])) for rank in range(ranks))


def on_core(number: int) -> dict[str, str]:
    """Environment that keeps an engine of one rank on one core, `number` counted round the cores there are.

    Engines side by side need it: vLLM binds every engine's main thread to the same first core, where one that steps
    without work (it spins) leaves the others next to nothing.
    """
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)])}
