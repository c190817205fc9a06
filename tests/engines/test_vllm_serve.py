"""`kvmp vllm serve`: a real API server with a server of kvmp's beside it, which ends with it and leaves its segment."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kvmp
from demo.engine_config import EngineConfig
from demo.model import VOCABULARY
from demo.processes import processes_of_session
from kvmp.errors import KvmpError
from tests.engines.harness import BLOCK, random_prompt, until

pytestmark = pytest.mark.smoke

START_S = 240.0
BLOCKS = 9


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[bytes]
    url: str
    endpoint: str
    log: Path

    def post(self, path: str, body: Any = None) -> Any:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def complete(self, prompt: list[int]) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        return self.post("/v1/completions", body)["choices"][0]["text"]

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return answer.status == 200
        return False

    def stats(self) -> dict[str, Any] | None:
        try:
            client = kvmp.Client.connect(self.endpoint, role="tool")
        except KvmpError:
            return None
        try:
            return client.stats()
        finally:
            client.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One word a token; the model itself has none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def served(model: str, tokenizer: Path, tmp_path: Path) -> Iterator[Served]:
    port, endpoint = _free_port(), f"unix:{tmp_path}/serve-{os.getpid()}.sock"
    flags = f"--tokenizer {tokenizer} --served-model-name tiny --port {port} --host 127.0.0.1 --enforce-eager"
    flags += f" --dtype float32 --block-size {BLOCK} --max-model-len 1024 --kv-cache-memory-bytes {64 << 20}"
    command = ["vllm", "serve", model, "--kvmp-size", "256MiB", "--kvmp-endpoint", endpoint, *flags.split()]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmp", *command],
            stdout=output,
            stderr=output,
            env={**os.environ, **EngineConfig(model).environment(), "VLLM_SERVER_DEV_MODE": "1"},
            start_new_session=True,
        )
    try:
        yield Served(process, f"http://127.0.0.1:{port}", endpoint, log)
    finally:
        for left in processes_of_session(process.pid):
            left.signal(signal.SIGKILL)
        process.wait()


def test_one_command_serves_and_cleans_up(served: Served) -> None:
    until(served.is_up, "the API server up", START_S)
    prompt = random_prompt("serve", BLOCKS * BLOCK + 5)
    first = served.complete(prompt)
    until(lambda: served.stats()["blocks_ready"] >= BLOCKS, "stored")
    served.post("/reset_prefix_cache")
    assert served.complete(prompt) == first
    stats = served.stats()
    assert stats["lookup_hit_blocks"] >= BLOCKS
    assert stats["pid"] != served.process.pid
    served.process.send_signal(signal.SIGTERM)
    served.process.wait(60)
    until(lambda: not Path(f"/proc/{stats['pid']}").exists(), "kvmp's server ended with vLLM")
    segment = Path(stats["segment"])
    assert segment.exists(), "the segment is left for the next start"
    segment.unlink()
    log = served.log.read_text()
    assert "kvmp: started a server of 256MiB" in log
    assert f"process {served.process.pid} ended" in log
