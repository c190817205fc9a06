"""`kvmp serve` with flags that `kvmp.launch` has not: it ends with this process, and may take over from another."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import kvmp
from kvmp.errors import KvmpError
from kvmp.server import Server

_WATCHDOG_S = 60.0
_DRAINED_S = 20.0


def serve(size: str, *, name: str, socket: Path, chunk: str | None = None, flags: tuple[str, ...] = ()) -> Server:
    """A server that answers, and that ends when this process does, however that ends; its segment stays."""
    words = ["--size", size, "--name", name, "--socket", str(socket), "--tcp", "off", "--until-pid", str(os.getpid())]
    words += [*(("--chunk", chunk) if chunk else ()), *flags]
    server = Server(
        [sys.executable, "-m", "kvmp", "serve", *words],
        segment=Path(f"/dev/shm/{name}.kvmp"),
        socket=socket,
        folder=Path(tempfile.mkdtemp(prefix="kvmp-")),
        ephemeral=False,
        env=dict(os.environ),
    )
    try:
        _await_own_answer(server)
    except BaseException:
        server.close()
        raise
    return server


def take_over(old: Server, size: str, *, name: str, chunk: str | None = None) -> Server:
    """Its successor by `--upgrade`, once that answers and the old one has ended in order."""
    new = serve(size, name=name, socket=old.socket_path, chunk=chunk, flags=("--upgrade",))
    try:
        assert old.process.wait(_DRAINED_S) == 0, old.log()
        _await_said(new, f"pid {old.pid} has let go of the segment")
    except BaseException:
        new.close()
        raise
    return new


def _await_own_answer(server: Server) -> None:
    """Return once it answers itself, and not the one that it takes over from."""
    _until(lambda: _answering_pid(server) == server.pid, server, "an answer of its own")


def _await_said(server: Server, words: str) -> None:
    """Return once it has said so: its log is written by a thread of its own, a moment later."""
    _until(lambda: words in server.log(), server, words)


def _until(condition: Callable[[], bool], server: Server, what: str) -> None:
    deadline = time.monotonic() + _WATCHDOG_S
    while not condition():
        assert server.process.poll() is None, f"it ended with {server.process.returncode}:\n{server.log()}"
        assert time.monotonic() < deadline, f"never happened: {what}:\n{server.log()}"
        time.sleep(0.005)


def _answering_pid(server: Server) -> int | None:
    try:
        with kvmp.Client.connect(server.endpoint, role="tool", timeout_ms=1000) as client:
            return client.stats(timeout_ms=1000)["pid"]
    except KvmpError:
        return None
