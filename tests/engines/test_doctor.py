"""`kvmp doctor --model`: whether an engine with these flags would find what the server holds."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

import kvmp
from demo.model import MAX_TOKENS
from kvmp.server import Server
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, stats, until


@pytest.fixture(scope="module")
def server(start_engine: StartEngine) -> Iterator[Server]:
    """A server that a real engine has opened its namespace at."""
    with kvmp.launch("64MiB") as server:
        start_engine(endpoint=server.endpoint).wait_up()
        until(lambda: stats(server)["namespaces"], "a namespace open")
        yield server


def said(server: Server, model: str, *flags: str) -> str:
    """The doctor's line on the namespace."""
    command = ["doctor", "--endpoint", server.endpoint, "--model", model, "--dtype", "float32", *flags]
    command += ["--skip-tokenizer-init", "--enforce-eager", "--max-model-len", str(MAX_TOKENS)]
    done = subprocess.run([sys.executable, "-m", "kvmp", *command], capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if " namespace " in line] or [done.stdout + done.stderr]
    return line


def test_an_engine_with_the_same_settings_matches(server: Server, model: str) -> None:
    line = said(server, model, "--block-size", str(BLOCK))
    assert line.startswith("ok "), line
    assert "matches an open namespace" in line


def test_the_setting_that_differs_is_named(server: Server, model: str) -> None:
    line = said(server, model, "--block-size", str(4 * BLOCK))
    assert line.startswith("warn"), line
    assert f"cache.block_size: there {BLOCK}, here {4 * BLOCK}" in line
    assert "model" not in line.partition("matches:")[2]


def test_a_model_that_is_none_is_said(server: Server, model: str) -> None:
    line = said(server, model + "-not-there", "--block-size", str(BLOCK))
    assert line.startswith("FAIL"), line
