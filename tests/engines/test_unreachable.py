"""`kvmp.on_unreachable`: an engine that starts its own server, and one that does not start without."""

import os
import signal
from pathlib import Path

import pytest

import kvmp
from demo.engine import EngineError
from kvmp.endpoint import server_name, start_command
from kvmp.errors import KvmpError
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, forget, random_prompt, until

BLOCKS = 5
PROMPT = random_prompt("own server", BLOCKS * BLOCK + 5)


class OwnServer:
    """The server that an engine starts for itself, seen from outside."""

    def __init__(self, folder: Path):
        self.endpoint = f"unix:{folder}/own-{os.getpid()}.sock"
        self.segment = Path(f"/dev/shm/{server_name(self.endpoint)}.kvmp")

    def stats(self) -> dict[str, int]:
        """Its counters; empty while it does not answer."""
        try:
            with kvmp.Client.connect(self.endpoint, role="tool") as client:
                return client.stats()
        except KvmpError:
            return {}

    def pid(self, *, attached: bool = True) -> int:
        """Its pid, once it answers and the engine is attached."""
        return until(lambda: (s := self.stats()) and (s["engines"] or not attached) and s["pid"], "its own server")


def test_an_engine_starts_its_own_server_and_another_when_that_dies(start_engine: StartEngine, tmp_path: Path) -> None:
    own = OwnServer(tmp_path)
    options = {"kvmp.on_unreachable": "spawn", "kvmp.spawn_size": "128MiB"}
    engine = start_engine(endpoint=own.endpoint, connector_config=options).wait_up()
    try:
        first = own.pid()
        until(lambda: not own.stats()["warming"], "its arena backed")
        (computed,) = engine.generate([PROMPT], NEW_TOKENS)
        until(lambda: own.stats()["blocks_ready"] >= BLOCKS, "stored")
        os.kill(first, signal.SIGKILL)
        until(lambda: own.pid() != first, "another server")
        forget(engine)
        (found,) = engine.generate([PROMPT], NEW_TOKENS)
        assert found.tokens == computed.tokens
        assert found.cached_tokens == BLOCKS * BLOCK
        second = own.pid()
        engine.kill()
        until(lambda: not Path(f"/proc/{second}").exists() or _is_zombie(second), "the server ended with its engine")
        assert own.segment.exists(), "left for the next start"
    finally:
        own.segment.unlink(missing_ok=True)


def _is_zombie(pid: int) -> bool:
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_an_engine_that_wants_a_server_does_not_start_without(start_engine: StartEngine, tmp_path: Path) -> None:
    endpoint = f"unix:{tmp_path}/none.sock"
    engine = start_engine(endpoint=endpoint, connector_config={"kvmp.on_unreachable": "fail"})
    with pytest.raises(EngineError):
        engine.wait_up()
    log = engine.log_path.read_text()
    assert f"no kvmp server at {endpoint}" in log
    assert f"for kvmp.on_unreachable is 'fail'; this starts one: {start_command(endpoint)}" in log
