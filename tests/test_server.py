"""`kvmp.launch`: a real server as a child process, from start to end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import kvmp
from kvmp.errors import ConnectError

SIZE = "64MiB"


def _ping(server: kvmp.Server) -> float:
    with closing(kvmp.Client.connect(server.endpoint, role="tool")) as client:
        return client.ping(timeout_ms=5000)


def test_a_launched_server_answers_at_once() -> None:
    with kvmp.launch(SIZE) as server:
        assert _ping(server) > 0
        assert server.pid == server.process.pid
        assert server.segment_path.exists()


def test_leaving_the_block_drains_the_server_and_leaves_nothing() -> None:
    with kvmp.launch(SIZE) as server:
        pass
    assert server.process.returncode == 0
    assert not server.segment_path.exists()
    assert not server.socket_path.exists()
    assert not server.log_path.exists()


def test_an_ephemeral_server_that_was_killed_leaves_nothing_either() -> None:
    with kvmp.launch(SIZE) as server:
        assert server.kill() == -signal.SIGKILL
        assert server.segment_path.exists()
    assert not server.segment_path.exists()


def test_a_lasting_server_keeps_its_segment_for_the_next_one(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}"
    try:
        with kvmp.launch(SIZE, name=name, ephemeral=False) as first, closing(_tool(first)) as client:
            segment = client.segment_id
        assert first.segment_path.exists()
        with kvmp.launch(SIZE, name=name, socket=tmp_path / "kvmp.sock") as second, closing(_tool(second)) as client:
            assert client.segment_id == segment
    finally:
        first.segment_path.unlink(missing_ok=True)


def _tool(server: kvmp.Server) -> kvmp.Client:
    return kvmp.Client.connect(server.endpoint, role="tool")


def test_a_server_that_cannot_start_says_why_in_its_own_words() -> None:
    with pytest.raises(kvmp.KvmpError, match=r"(?s)ended with code [1-9]\d* before it was ready:\n.*nonsense"):
        kvmp.launch(SIZE, policy="nonsense")


def test_a_server_that_stays_silent_is_given_up_and_ended() -> None:
    with pytest.raises(kvmp.KvmpError, match=r"not ready within 0\.0 s"):
        kvmp.launch(SIZE, timeout_s=0.0)


def test_a_socket_that_is_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kvmp.sock"
    with kvmp.launch(SIZE, socket=path) as server:
        with pytest.raises(kvmp.KvmpError, match="a server already answers"):
            kvmp.launch(SIZE, socket=path)
        assert _ping(server) > 0


def test_a_server_that_hangs_is_killed_after_its_time() -> None:
    with kvmp.launch(SIZE) as server:
        server.process.send_signal(signal.SIGSTOP)
        assert server.stop(timeout_s=0.2) == -signal.SIGKILL


def test_a_client_of_a_stopped_server_is_refused() -> None:
    with kvmp.launch(SIZE) as server:
        server.stop()
        with pytest.raises(ConnectError, match=str(server.socket_path)):
            kvmp.Client.connect(server.endpoint, role="tool")


def test_a_launch_that_fails_removes_nothing_of_others(tmp_path: Path) -> None:
    """Neither a running server's segment, nor one kept for later, nor a file that a name could reach."""
    name = f"launch-others-{tmp_path.name}"
    with kvmp.launch("16MiB", name=name, socket=tmp_path / "a.sock") as server:
        with pytest.raises(kvmp.errors.KvmpError, match="already runs under the name"):
            kvmp.launch("16MiB", name=name, socket=tmp_path / "b.sock")
        assert server.segment_path.exists()
        assert server.process.poll() is None
    kept = Path(f"/dev/shm/{name}.kvmp")
    kept.write_bytes(b"precious")
    try:
        with pytest.raises(kvmp.errors.KvmpError):
            kvmp.launch("16MiB", name=name, policy="nonsense")
        assert kept.read_bytes() == b"precious"
    finally:
        kept.unlink()


def test_ctrl_c_drains_and_ends_well(tmp_path: Path) -> None:
    with kvmp.launch("16MiB", socket=tmp_path / "kvmp.sock") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log()
        assert "the segment is removed" in server.log()


@pytest.mark.parametrize("ephemeral", [False, True])
def test_a_server_ends_with_the_process_it_watches(tmp_path: Path, ephemeral: bool) -> None:
    name, log = f"test-until-{os.getpid()}", tmp_path / "log"
    segment = Path(f"/dev/shm/{name}.kvmp")
    watched = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    command = [sys.executable, "-m", "kvmp", "serve", "--size", "16MiB", "--name", name, "--tcp", "off"]
    flags = ["--socket", str(tmp_path / "kvmp.sock"), "--until-pid", str(watched.pid), *["--ephemeral"][:ephemeral]]
    try:
        with log.open("wb") as out, subprocess.Popen([*command, *flags], stderr=out, start_new_session=True) as server:
            deadline = time.monotonic() + 20
            while "ready:" not in log.read_text():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
            watched.kill()
            assert server.wait(20) == 0
        assert f"process {watched.pid} ended: stopping" in log.read_text()
        assert segment.exists() is not ephemeral
    finally:
        watched.kill()
        watched.communicate()
        segment.unlink(missing_ok=True)
