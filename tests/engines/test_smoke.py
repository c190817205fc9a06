"""Every way to put kvmp into an engine ends in hits; run on the newest vLLM and, by `make test-compat`, the oldest."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kvmp
from demo.engine import Engine
from kvmp.endpoint import start_command
from tests.engines.conftest import StartEngine
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    await_backing,
    await_blocks,
    forget,
    loaded_tokens,
    random_prompt,
    stats,
    until,
)

pytestmark = pytest.mark.smoke

BLOCKS = 9


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


PORT = _port()


def by_module_path(endpoint: str) -> dict[str, Any]:
    """As where vLLM loads no plugins."""
    return {"endpoint": endpoint, "env": {"VLLM_PLUGINS": ""}}


def by_name(endpoint: str) -> dict[str, Any]:
    """What the README says: the plugin makes the name known."""
    extra = {"kvmp.endpoint": endpoint}
    transfer = {"kv_connector": "KvmpConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {"engine_args": {"kv_transfer_config": transfer}}


def in_the_place_of_lmcache(endpoint: str) -> dict[str, Any]:
    """vLLM's own offloading flags, with LMCache's host and port."""
    extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": PORT}
    return {
        "engine_args": {
            "kv_offloading_size": 1.0,
            "kv_offloading_backend": "lmcache",
            "kv_transfer_config": {"kv_connector_extra_config": extra},
        },
        "env": {"KVMP_REPLACE_LMCACHE": "1"},
    }


WAYS: list[Callable[[str], dict[str, Any]]] = [by_module_path, by_name, in_the_place_of_lmcache]


@dataclass(frozen=True)
class Running:
    server: kvmp.Server
    engines: dict[str, Engine]
    """By the name of its way; started side by side, not all of them up yet."""


@pytest.fixture(scope="module")
def running(start_engine: StartEngine) -> Iterator[Running]:
    with kvmp.launch("256MiB", tcp=f"127.0.0.1:{PORT}") as server:
        yield Running(server, {way.__name__: start_engine(**way(server.endpoint)) for way in WAYS})


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_an_engine_finds_what_it_stored(running: Running, way: str) -> None:
    engine = running.engines[way].wait_up()
    prompt = random_prompt(way, BLOCKS * BLOCK + 5)
    (computed,) = _once_attached(running.server, lambda: engine.generate([prompt], NEW_TOKENS))
    forget(engine)
    before = loaded_tokens(engine)
    (found,) = engine.generate([prompt], NEW_TOKENS)
    assert found.tokens == computed.tokens
    assert loaded_tokens(engine) - before == found.cached_tokens == BLOCKS * BLOCK


def test_ways_share_one_cache(running: Running) -> None:
    prompt = random_prompt("shared by all ways", BLOCKS * BLOCK + 5)
    first, second = (running.engines[way.__name__].wait_up() for way in WAYS[1:])
    (computed,) = _once_attached(running.server, lambda: first.generate([prompt], NEW_TOKENS))
    (found,) = second.generate([prompt], NEW_TOKENS)
    assert found.tokens == computed.tokens
    assert found.cached_tokens == BLOCKS * BLOCK


def _once_attached(server: kvmp.Server, generate: Callable[[], Any]) -> Any:
    """What the engine answers; it is over once the engine's blocks are committed."""
    ready = stats(server)["blocks_ready"]
    outputs = generate()
    await_blocks(server, ready + BLOCKS)
    return outputs


def test_a_server_that_comes_later_is_used(start_engine: StartEngine, tmp_path: Path) -> None:
    """Beside the engines above: it starts without a server, works, and attaches by itself when one comes."""
    socket_path = tmp_path / "kvmp.sock"
    engine = start_engine(**by_name(f"unix:{socket_path}")).wait_up()
    prompt = random_prompt("later", BLOCKS * BLOCK + 5)
    (alone,) = engine.generate([prompt], NEW_TOKENS)
    warnings = [line for line in engine.log_path.read_text().splitlines() if "kvmp: no kvmp server at" in line]
    assert len(warnings) == 1
    assert str(socket_path) in warnings[0]
    assert start_command(f"unix:{socket_path}") in warnings[0]
    with kvmp.launch("256MiB", socket=socket_path) as server:
        until(lambda: stats(server)["engines"], "the engine attached")
        await_backing(server)
        forget(engine)
        (computed,) = _once_attached(server, lambda: engine.generate([prompt], NEW_TOKENS))
        forget(engine)
        (found,) = engine.generate([prompt], NEW_TOKENS)
        assert found.cached_tokens == BLOCKS * BLOCK
        assert alone.tokens == computed.tokens == found.tokens
        engine.kill()
