"""`kvmp vllm serve`: what it runs, and what it refuses; the run itself is in tests/engines/test_vllm_serve.py."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kvmp
from kvmp import background, default_size
from kvmp.commands import vllm_serve
from kvmp.config import ConnectorConfig
from kvmp.config.size import parse_size
from kvmp.endpoint import server_name
from kvmp.errors import KvmpError
from kvmp.memory import MemoryBound


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMP_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def nobody(tmp_path: Path) -> str:
    """An endpoint where no server answers."""
    return f"unix:{tmp_path}/nobody.sock"


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert vllm_serve.main(["serve", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def transfer(line: str) -> dict[str, object]:
    words = shlex.split(line)
    return json.loads(words[words.index("--kv-transfer-config") + 1])


def test_the_connector_is_set_and_vllms_flags_are_kept(capsys: pytest.CaptureFixture[str], nobody: str) -> None:
    _, line = dry_run(capsys, "m/odel", "--kvmp-endpoint", nobody, "--port", "81", "--dtype=auto", "--enforce-eager")
    words = shlex.split(line)
    assert words[0] == "exec"
    assert "m/odel" in words
    at = words.index("--port")
    assert words[at : at + 4] == ["--port", "81", "--dtype=auto", "--enforce-eager"]
    assert not [word for word in words if word.startswith(("--kvmp", "--dry"))]
    assert transfer(line) == {
        "kv_connector": "KvmpConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvmp.endpoint": nobody},
    }


def test_a_server_is_started_for_the_process_where_none_answers(
    capsys: pytest.CaptureFixture[str], nobody: str
) -> None:
    serve, _ = dry_run(capsys, "m", "--kvmp-endpoint", nobody, "--kvmp-size", "3GiB")
    path = nobody.removeprefix("unix:")
    assert serve == f"kvmp serve --size 3GiB --name {server_name(nobody)} --socket {path} --tcp off --until-pid $$ &"


def test_somebodys_endpoint_is_not_served_by_us_unasked(capsys: pytest.CaptureFixture[str], nobody: str) -> None:
    comment, _ = dry_run(capsys, "m", "--kvmp-endpoint", nobody)
    assert comment.startswith(f"# no server at {nobody}")
    assert "kvmp serve --size 4GiB" in comment


@pytest.mark.parametrize("key", ["kv-offloading-size: 1", "kv_offloading_backend: native", "'kv-transfer-config': x"])
def test_vllms_own_file_of_flags_is_looked_into(
    capsys: pytest.CaptureFixture[str], nobody: str, tmp_path: Path, key: str
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(f"port: 81\n{key}\n")
    for flags in (["--config", str(file)], [f"--config={file}"]):
        assert vllm_serve.main(["serve", "m", "--kvmp-endpoint", nobody, *flags, "--dry-run"]) == 2
        assert f"{file}: kv" in capsys.readouterr().err
    file.write_text("port: 81\n# kv-offloading-size: 1\n")
    _, line = dry_run(capsys, "m", "--kvmp-endpoint", nobody, "--config", str(file))
    assert f"--config {file}" in line


def test_flags_of_ours_may_have_underscores(capsys: pytest.CaptureFixture[str], nobody: str) -> None:
    serve, _ = dry_run(capsys, "m", "--kvmp_endpoint", nobody, "--kvmp_size=3GiB")
    assert "--size 3GiB" in serve


def test_a_server_to_spawn_has_its_size_here_too(
    capsys: pytest.CaptureFixture[str], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMP_SPAWN_SIZE", "3GiB")
    serve, _ = dry_run(capsys, "m", "--kvmp-endpoint", nobody, "--kv-transfer-config", SPAWN)
    assert "--size 3GiB" in serve


@pytest.mark.parametrize(
    ("installed", "text"),
    [
        ({"vllm": "0.28.0"}, "this is vLLM 0.28.0, and kvmp is written for vLLM 0.29 to 0.33"),
        ({}, "there is no vLLM in kvmp's environment"),
        ({"vllm": "0.32.0"}, "cannot be run: install vLLM"),
    ],
)
def test_a_vllm_that_will_not_do_is_refused_before_a_server_starts(
    capsys: pytest.CaptureFixture[str],
    nobody: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: dict[str, str],
    text: str,
) -> None:
    monkeypatch.setattr(vllm_serve.version, "of", installed.get)
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/python")
    assert vllm_serve.main(["serve", "m", "--kvmp-endpoint", nobody, "--kvmp-size", "1GiB"]) == 2
    assert text in capsys.readouterr().err


def test_what_cannot_be_run_is_named_and_its_server_ends(
    capsys: pytest.CaptureFixture[str], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(program: str, arguments: list[str]) -> None:
        raise OSError(7, "Argument list too long")

    monkeypatch.setattr(os, "execvp", refuse)
    monkeypatch.setattr(vllm_serve, "_find_or_start", lambda config, size: None)
    assert vllm_serve.main(["serve", "m", "--kvmp-endpoint", nobody]) == 1
    assert f"cannot run {sys.executable}: Argument list too long" in capsys.readouterr().err


def test_a_running_server_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with kvmp.launch("64MiB") as server:
        comment, line = dry_run(capsys, "m", "--kvmp-endpoint", server.endpoint, "--kvmp-size", "3GiB")
    assert comment == f"# a server answers at {server.endpoint}"
    assert transfer(line)["kv_connector_extra_config"] == {"kvmp.endpoint": server.endpoint}


def test_another_program_at_the_endpoint_is_told_from_nobody(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(f"{tmp_path}/other.sock")
        other.listen()
        assert vllm_serve.main(["serve", "m", "--kvmp-endpoint", f"unix:{tmp_path}/other.sock", "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert "is no server for us" in said
    assert "--kvmp-endpoint unix:/PATH/NAME.sock" in said


def test_settings_of_every_source_reach_the_engine(
    capsys: pytest.CaptureFixture[str], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMP_ENDPOINT", nobody)
    given = {"kv_connector_extra_config": {"kvmp.timeout_ms": 7, "other": 1}}
    _, line = dry_run(capsys, "m", "--kv-transfer-config", json.dumps(given))
    assert transfer(line)["kv_connector_extra_config"] == {"kvmp.endpoint": nobody, "kvmp.timeout_ms": 7, "other": 1}


SPAWN = json.dumps({"kv_connector_extra_config": {"kvmp.on_unreachable": "spawn"}})


@pytest.mark.parametrize(
    ("variable", "flags", "size"),
    [
        ("64GiB", ["--kvmp-size", "32GiB"], "64GiB"),
        ("", ["--kvmp-size", "32GiB"], "32GiB"),
        ("64GiB", [], "64GiB"),
    ],
)
def test_a_spawning_engine_gets_the_size_that_was_given(
    capsys: pytest.CaptureFixture[str],
    nobody: str,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    flags: list[str],
    size: str,
) -> None:
    monkeypatch.setenv("KVMP_SPAWN_SIZE", variable)
    *_, line = dry_run(capsys, "m", "--kvmp-endpoint", nobody, *flags, "--kv-transfer-config", SPAWN)
    assert transfer(line)["kv_connector_extra_config"]["kvmp.spawn_size"] == size


def test_an_engine_that_spawns_nothing_gets_no_size(capsys: pytest.CaptureFixture[str], nobody: str) -> None:
    _, line = dry_run(capsys, "m", "--kvmp-endpoint", nobody, "--kvmp-size", "3GiB")
    assert transfer(line)["kv_connector_extra_config"] == {"kvmp.endpoint": nobody}


def test_the_module_is_named_where_plugins_are_switched_off(
    capsys: pytest.CaptureFixture[str], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    _, line = dry_run(capsys, "m", "--kvmp-endpoint", nobody)
    assert transfer(line)["kv_connector_module_path"] == "kvmp.vllm.connector"


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({}, []),
        ({"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}, []),
        ({"kv_role": "kv_producer"}, ["kv_role 'kv_producer' becomes 'kv_both'"]),
        ({"kv_connector_module_path": "mine"}, ["kv_connector_module_path 'mine' becomes 'kvmp.vllm.connector'"]),
    ],
)
def test_what_is_replaced_is_said(
    capsys: pytest.CaptureFixture[str], nobody: str, given: dict[str, str], texts: list[str]
) -> None:
    flags = ["--kvmp-endpoint", nobody, "--kv-transfer-config", json.dumps(given), "--dry-run"]
    assert vllm_serve.main(["serve", "m", *flags]) == 0
    said = capsys.readouterr()
    assert [line.removeprefix("kvmp: ") for line in said.err.splitlines()] == texts
    assert transfer(said.out.splitlines()[-1])["kv_role"] == "kv_both"


def test_a_policy_that_is_replaced_is_said(capsys: pytest.CaptureFixture[str], nobody: str) -> None:
    given = json.dumps({"kv_load_failure_policy": "fail"})
    arguments = ["serve", "m", "--kvmp-endpoint", nobody, "--kv-transfer-config", given, "--dry-run"]
    assert vllm_serve.main(arguments) == 0
    said = capsys.readouterr()
    assert "kv_load_failure_policy 'fail' becomes 'recompute'" in said.err
    assert transfer(said.out.splitlines()[-1])["kv_load_failure_policy"] == "recompute"


def tightest(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    bounds = [MemoryBound("the cage", 1 << 50, free, "raise the limit"), MemoryBound("all", 1 << 50, 1 << 50, "")]
    monkeypatch.setattr(default_size, "memory_bounds", lambda: bounds)


@pytest.mark.parametrize(("free_gib", "size"), [(64, "16GiB"), (7, "1GiB"), (2, "512MiB")])
def test_the_size_nobody_gave(monkeypatch: pytest.MonkeyPatch, nobody: str, free_gib: int, size: str) -> None:
    tightest(monkeypatch, free_gib << 30)
    assert default_size.default_size(nobody) == size


def test_too_little_memory_names_what_bounds_it(monkeypatch: pytest.MonkeyPatch, nobody: str) -> None:
    tightest(monkeypatch, 800 << 20)
    with pytest.raises(KvmpError, match=r"quarter of the 800 MiB that the cage .* \(raise the limit\)"):
        default_size.default_size(nobody)


def test_a_size_nobody_gave_is_that_of_what_was_left(nobody: str) -> None:
    name = server_name(nobody)
    with kvmp.launch("150MiB", name=name, ephemeral=False) as server:
        server.stop()
        try:
            assert parse_size(default_size.default_size(nobody)) == 150 << 20
        finally:
            server.segment_path.unlink()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["serve", "m", "--kv-transfer-config", "{"], ["is not JSON"]),
        (["serve", "m", "--kv-transfer-config=[]"], ["not a JSON object"]),
        (["serve", "m", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], ["NixlConnector", "Multi"]),
        (["serve", "m", "--kv-transfer-config", '{"kv_rol": 1}'], ["'kv_rol'", "kv_role"]),
        (["serve", "m", "--kv-transfer-config.kv_role", "x"], ["one JSON object"]),
        (["serve", "m", "--kv-offloading-size", "4"], ["--kv-offloading-size", "--kvmp-size"]),
        (["serve", "m", "--kv_offloading_backend=native"], ["--kv-offloading-backend", "--kvmp-size"]),
        (["serve", "m", "--kvmp-endpoint", "http://x"], ["http://x", "unix:"]),
        (
            ["serve", "m", "--kvmp-endpoint", "unix://rel/x.sock"],
            ["--kvmp-endpoint: 'unix://rel/x.sock' given", "unix:/PATH"],
        ),
        (["serve", "m", "--kvmp-sise", "3GiB"], ["--kvmp-sise", "did you mean '--kvmp-size'?"]),
        (["serve", "m", "--kvmp_endpoit=unix:/x"], ["--kvmp-endpoit", "did you mean '--kvmp-endpoint'?"]),
        (["serve", "m", "--kv-offloading-siz", "4"], ["--kv-offloading-size", "--kvmp-size"]),
        (["serve", "m", "--kv-transfer-conf", "{"], ["is not JSON"]),
        (["serve", "--port", "1", "m"], ["kvmp vllm serve MODEL FLAGS"]),
        (["serve", "m", "--", "n"], ["-- ends the flags", "leave it out"]),
        (["bench"], ["kvmp vllm bench", "serve"]),
        ([], ["kvmp vllm"]),
    ],
)
def test_what_cannot_be_done_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], texts: list[str]
) -> None:
    assert vllm_serve.main([*arguments, "--dry-run"] if arguments else []) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in texts), said


@pytest.mark.parametrize("size", ["much", "0", "0GiB", "-1GiB", ""])
def test_a_size_that_is_none_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], nobody: str, size: str
) -> None:
    assert vllm_serve.main(["serve", "m", "--kvmp-endpoint", nobody, f"--kvmp-size={size}", "--dry-run"]) == 2
    assert "--kvmp-size" in capsys.readouterr().err


def test_a_background_server_ends_with_the_process_it_serves(nobody: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as watched:
        try:
            server = background.start("64MiB", nobody, until_pid=watched.pid)
            assert server is not None
            assert os.getsid(server.pid) == server.pid
        finally:
            watched.kill()
    assert server.wait(10) == 0
    segment = Path(f"/dev/shm/{server_name(nobody)}.kvmp")
    assert segment.exists()
    segment.unlink()


def test_one_that_came_first_is_used(nobody: str) -> None:
    with kvmp.launch("64MiB", name=server_name(nobody), socket=nobody.removeprefix("unix:")):
        assert background.start("64MiB", nobody, until_pid=os.getpid()) is None


def test_a_server_that_is_slow_for_a_moment_is_still_the_one_that_was_started(
    nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    pid_at = background._pid_at

    def slow(endpoint: str, socket_dir: str | None) -> int | None:
        found = pid_at(endpoint, socket_dir)
        if found is not None:
            asked.append(endpoint)
        return found if len(asked) > 3 else None

    monkeypatch.setattr(background, "_pid_at", slow)
    server = background.start("64MiB", nobody, until_pid=os.getpid())
    assert server is not None
    try:
        assert len(asked) == 4
        assert server.poll() is None
    finally:
        server.terminate()
        server.wait(10)
        Path(f"/dev/shm/{server_name(nobody)}.kvmp").unlink()


def test_a_server_that_is_looked_for_elsewhere_is_not_ready(nobody: str, tmp_path: Path) -> None:
    with pytest.raises(KvmpError, match=rf"not ready within 1.0 s \(looked for in {tmp_path}/elsewhere\)"):
        background.start("64MiB", nobody, until_pid=os.getpid(), socket_dir=f"{tmp_path}/elsewhere", timeout_s=1.0)
    segment = Path(f"/dev/shm/{server_name(nobody)}.kvmp")
    until_gone(segment)


def until_gone(segment: Path) -> None:
    """Waits for the terminated server's lock to go, and removes what it left."""
    deadline = time.monotonic() + 10
    while subprocess.run([sys.executable, "-m", "kvmp", "rm", segment.stem], capture_output=True).returncode:
        assert time.monotonic() < deadline


def test_a_running_server_is_found_and_none_is_started(capsys: pytest.CaptureFixture[str], nobody: str) -> None:
    config = ConnectorConfig(endpoint=nobody)
    with kvmp.launch("64MiB", name=server_name(nobody), socket=nobody.removeprefix("unix:")):
        vllm_serve._find_or_start(config, "1TiB")  # such a size would fail to start
    assert capsys.readouterr().err == f"kvmp: using the server at {nobody}; it keeps its own size\n"


@pytest.mark.parametrize(
    ("wish", "text"),
    [("degrade", "starts without its cache"), ("fail", None)],
)
def test_what_happens_without_a_server_is_said_as_it_is(
    capsys: pytest.CaptureFixture[str], nobody: str, wish: Any, text: str | None
) -> None:
    config = ConnectorConfig(endpoint=nobody, on_unreachable=wish, spawn_size="1GiB")
    if text is None:
        with pytest.raises(KvmpError, match="on_unreachable is 'fail'; start one: kvmp serve"):
            vllm_serve._find_or_start(config, None)
    else:
        vllm_serve._find_or_start(config, None)
        assert text in capsys.readouterr().err


def test_what_keeps_us_from_an_endpoint_is_said_and_nothing_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["serve", "m", "--kvmp-endpoint", "tcp://no.such.host.invalid:5555", "--kvmp-size", "1GiB"]
    assert vllm_serve.main(arguments) == 1
    said = capsys.readouterr().err
    assert "cannot be reached" in said
    assert "Stop it" not in said


def test_a_background_server_that_cannot_start_is_an_error(nobody: str) -> None:
    with pytest.raises(KvmpError, match="ended with code"):
        background.start("64MiB", nobody, until_pid=2**22 + 1)
