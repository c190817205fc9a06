"""`kvmp serve` with flags that `kvmp.launch` has not: it ends with this process, and may take over from another."""

import os
import sys
import tempfile
import time
from pathlib import Path

import kvmp
from kvmp.errors import KvmpError
from kvmp.server import Server

_READY_S = 60.0
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
        assert f"asking pid {old.pid}" in new.log(), new.log()
        assert "has let go of the segment" in new.log(), new.log()
    except BaseException:
        new.close()
        raise
    return new


def _await_own_answer(server: Server) -> None:
    """Return once it answers itself, and not the one that it takes over from."""
    deadline = time.monotonic() + _READY_S
    while _answering_pid(server) != server.pid:
        assert server.process.poll() is None, f"it ended with {server.process.returncode}:\n{server.log()}"
        assert time.monotonic() < deadline, f"it does not answer:\n{server.log()}"
        time.sleep(0.005)


def _answering_pid(server: Server) -> int | None:
    try:
        with kvmp.Client.connect(server.endpoint, role="tool", timeout_ms=1000) as client:
            return client.stats(timeout_ms=1000)["pid"]
    except KvmpError:
        return None
