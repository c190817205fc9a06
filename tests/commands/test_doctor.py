"""`kvmp doctor`: what is fine, what is not, and the mend."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvmp
from kvmp.config import ConfigError
from kvmp.default_size import default_size
from kvmp.doctor import machine, match, software
from kvmp.doctor import server as look_at_server
from kvmp.doctor.finding import Finding, Level
from kvmp.endpoint import start_command
from kvmp.memory import MemoryBound


def doctor(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "kvmp", "doctor", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def fails(said: str) -> int:
    """The exit code that goes with the lines: what this machine itself lacks is not the test's affair."""
    return int(any(line.startswith("FAIL") for line in said.splitlines()))


def test_a_server_that_is_well_is_said_to_be() -> None:
    with kvmp.launch("64MiB") as server:
        code, said = doctor("--endpoint", server.endpoint)
    assert code == fails(said), said
    assert f"ok    server           {server.endpoint}, pid {server.pid}" in said
    for what in ("shared memory", "open files", "huge pages", "socket folder", "vLLM", "torch", "arena", "in use"):
        assert what in said


def test_no_server_is_no_failure_and_comes_with_the_command(tmp_path: Path) -> None:
    endpoint = f"unix:{tmp_path}/none.sock"
    code, said = doctor("--endpoint", endpoint)
    assert code == fails(said)
    assert "warn  server" in said
    assert f"mend: {start_command(endpoint, default_size(endpoint))}" in said


def test_what_answers_but_is_no_server_fails(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(f"{tmp_path}/other.sock")
        other.listen()
        code, said = doctor("--endpoint", f"unix:{tmp_path}/other.sock")
    assert code == 1
    assert "FAIL  server" in said


def test_wrong_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = doctor("--endpoint", "http://x")
    assert code == 1
    assert "mend: give another --endpoint" in said
    monkeypatch.setenv("KVMP_TIMEOUT_MS", "soon")
    _, said = doctor("--endpoint", "unix:/x")
    assert "not looked at, for the settings above are wrong" in said
    assert "--endpoint" not in said.split("server")[-1]
    code, said = doctor("--endpont", "unix:/x")
    assert code == 2
    assert "--endpont" in said


@pytest.mark.parametrize(
    ("look", "level", "text"),
    [
        (lambda folder: machine.shared_memory(folder / "none"), Level.FAIL, "mount -t tmpfs"),
        (lambda folder: machine.memory([_bound(free=1 << 29)]), Level.WARN, "raise the limit"),
        (lambda folder: machine.memory([_bound(free=1 << 31)]), Level.OK, "2.0 GiB free of 4.0 GiB, by the cage"),
        (lambda folder: machine.huge_pages(folder / "none"), Level.OK, "4 KiB pages"),
        (lambda folder: machine.huge_pages(_text(folder, "always [never]")), Level.WARN, "echo within_size"),
        (lambda folder: machine.huge_pages(_text(folder, "[always] never")), Level.OK, "on for shared memory"),
        (lambda folder: machine.socket_folder(folder / "none"), Level.WARN, "map the server's folder"),
        (lambda folder: machine.socket_folder(_file(folder) / "x"), Level.FAIL, "Not a directory"),
        (lambda folder: machine.socket_folder(folder / ("x" * 300)), Level.FAIL, "File name too long"),
        (lambda folder: machine.shared_memory(folder), Level.FAIL, "no file system in memory"),
        (lambda folder: machine.socket_folder(_another_users(folder)), Level.FAIL, "belongs to uid 4711"),
        (lambda folder: machine.socket_folder(_file(folder)), Level.FAIL, "not a folder"),
        (lambda folder: machine.socket_folder(_open(folder)), Level.WARN, "written by others"),
    ],
)
def test_what_is_not_fine_is_seen(tmp_path: Path, look: Callable[[Path], Finding], level: Level, text: str) -> None:
    found = look(tmp_path)
    assert found.level is level
    assert text in found.says + found.mend


def _bound(free: int) -> MemoryBound:
    return MemoryBound("the cage", 1 << 32, free, "raise the limit")


def _text(folder: Path, text: str) -> Path:
    (folder / "text").write_text(text)
    return folder / "text"


def _file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def _another_users(folder: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    (folder / "given").mkdir()
    os.chown(folder / "given", 4711, 4711)
    return folder / "given"


def _open(folder: Path) -> Path:
    (folder / "open").mkdir(mode=0o777)
    (folder / "open").chmod(0o777)
    return folder / "open"


@pytest.mark.parametrize(
    ("version", "level"), [("0.28.1", Level.FAIL), ("0.30.0", Level.OK), ("0.34.0", Level.FAIL), ("dev", Level.WARN)]
)
def test_vllms_version_is_judged(monkeypatch: pytest.MonkeyPatch, version: str, level: Level) -> None:
    monkeypatch.setattr(software.version, "installed", lambda: version)
    found = software.vllm()
    assert found.level is level
    assert version in found.says


@pytest.mark.parametrize(("allowed", "mend"), [("other", "VLLM_PLUGINS=other,kvmp"), ("", "VLLM_PLUGINS=kvmp")])
def test_a_plugin_list_without_kvmp_is_seen(monkeypatch: pytest.MonkeyPatch, allowed: str, mend: str) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    found = software.plugin()
    assert found.level is Level.WARN
    assert found.mend.startswith(f"{mend}, or")


def test_a_vllm_that_is_told_nothing_is_not_said_to_know_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.version, "installed", lambda: "0.28.0")
    assert "vLLM knows" not in software.plugin().says


def test_torch_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.version, "of", lambda name: None)
    assert software.torch().level is Level.WARN


@pytest.mark.parametrize(
    ("limit", "bound", "level", "what"),
    [
        (resource.RLIMIT_NOFILE, 256, Level.WARN, "open files"),
        (resource.RLIMIT_FSIZE, 1 << 20, Level.FAIL, "file size"),
        (resource.RLIMIT_AS, 1 << 40, Level.WARN, "address space"),
        (resource.RLIMIT_CORE, 0, None, ""),
    ],
)
def test_limits_are_seen(
    monkeypatch: pytest.MonkeyPatch, limit: int, bound: int, level: Level | None, what: str
) -> None:
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (bound, bound) if asked == limit else none)
    assert [(found.level, found.what) for found in machine.limits() if found.level is not Level.OK] == (
        [(level, what)] if level else []
    )


@pytest.mark.parametrize(("blocks", "level"), [(1 << 10, Level.FAIL), (1 << 20, Level.OK), (0, Level.OK)])
def test_shared_memory_is_judged_by_its_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blocks: int, level: Level
) -> None:
    there = SimpleNamespace(f_blocks=blocks, f_bavail=blocks, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: there)
    monkeypatch.setattr(machine, "lies_in_memory", lambda folder: True)
    assert machine.shared_memory(tmp_path).level is level


@pytest.mark.parametrize(
    ("changed", "what", "level"),
    [
        ({}, "arena", Level.OK),
        ({"warming": True, "backed_bytes": 1}, "arena", Level.OK),
        ({"backed_bytes": 1}, "arena", Level.WARN),
        ({"version": "0.0.1"}, "server version", Level.WARN),
    ],
)
def test_a_server_is_judged_by_what_it_says(changed: dict[str, Any], what: str, level: Level) -> None:
    with kvmp.launch("64MiB") as server, kvmp.Client.connect(server.endpoint, role="tool") as client:
        stats = client.stats() | {"warming": False, "backed_bytes": 64 << 20} | changed
        version = changed.get("version", client.server_version)
    told = SimpleNamespace(
        ping=lambda timeout_ms: 0.001, stats=lambda: stats, server_version=version, endpoint=server.endpoint
    )
    assert {found.what: found.level for found in look_at_server.check(told)}[what] is level


def test_what_keeps_us_from_the_server_is_said_with_its_own_mend() -> None:
    found = look_at_server.connect("tcp://no.such.host.invalid:5555", None)
    assert isinstance(found, Finding)
    assert "cannot be reached" in found.says
    assert "stop it" not in found.mend


def test_who_reads_no_further_gets_no_traceback() -> None:
    command = f"{sys.executable} -m kvmp doctor --endpoint unix:/none.sock | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_no_vllm_is_blamed_for_what_is_not_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(error: Exception) -> Callable[[object, object], None]:
        def fail(flags: object, ignored: object) -> None:
            raise error

        return fail

    for error, text in [
        (ImportError("No module named 'vllm'"), "vLLM cannot be imported (No module"),
        (ConfigError("KVMP_X: 1 given"), "KVMP_X: 1 given"),
        (ValueError("unrecognized arguments: --x"), "vLLM does not take --model m: unrecognized arguments: --x"),
    ]:
        monkeypatch.setattr(match, "engine", engine(error))
        (found,) = match.check(None, ["--model", "m"])  # type: ignore[arg-type]
        assert found.level is Level.FAIL
        assert text in found.says


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMP_TIMEOUT_MS", "soon")
    found = software.settings()
    assert found.level is Level.FAIL
    assert "KVMP_TIMEOUT_MS" in found.says


def test_the_folder_of_the_endpoint_is_looked_at(tmp_path: Path) -> None:
    _, said = doctor("--endpoint", f"unix:{_open(tmp_path)}/none.sock")
    assert f"{tmp_path}/open can be written by others" in said


FACTS = {"cache": {"block_size": 32, "dtype": "auto"}, "vllm": "0.32", "workers": [1]}


def spec(**changed: object) -> dict[str, object]:
    return {"model": "m", "facts": {**FACTS, **changed}, "salt": ""}


def test_a_namespace_that_matches() -> None:
    here = {key: value for key, value in FACTS.items() if key != "workers"}
    assert "matches" in match.compare("m", here, [spec(vllm="0.31"), spec()]).says


def test_the_nearest_namespace_is_told_apart_field_by_field() -> None:
    here = {"cache": {"block_size": 64, "dtype": "auto"}, "vllm": "0.32"}
    found = match.compare("m", here, [spec(vllm="0.29"), spec()])
    assert found.level is Level.WARN
    assert "cache.block_size: there 32, here 64" in found.says
    assert "vllm" not in found.says


@pytest.mark.parametrize("other", [{"model": "n"}, {"salt": "x"}, {"facts": {**FACTS, "adapter_sha256": "y"}}])
def test_what_no_plain_engine_opened_is_not_compared(other: dict[str, object]) -> None:
    assert "nothing of m yet" in match.compare("m", FACTS, [spec() | other]).says
