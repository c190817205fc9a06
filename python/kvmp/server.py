"""``kvmp.launch``: a server as a child process, for as long as a ``with`` block or until ``stop()``.

starting -> ready -> stopped | killed
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from .client import Client
from .errors import ConnectError, KvmpError

_POLL_S = 0.005  # between two looks at a server that is starting
_STOP_S = 10.0  # what a server has to drain before it is killed
_LOG_LINES = 20  # of a failed server, quoted in the error


class Server:
    """A running ``kvmp serve``, owned by this process.

    Leaving the ``with`` block stops it. A server outlives a parent that is killed, and so does its segment.
    """

    def __init__(
        self, command: list[str], *, segment: Path, socket: Path, folder: Path, ephemeral: bool, env: dict[str, str]
    ):
        self.segment_path = segment
        """The segment's file, under the arena directory."""
        self.socket_path = socket
        self.log_path = folder / "server.log"
        """What the server printed; gone after the ``with`` block."""
        self._folder = folder
        self._ephemeral = ephemeral
        # The file that this server is known to have made or taken over; nobody else's is ever removed.
        self._own_segment: tuple[int, int] | None = None
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)

    @property
    def endpoint(self) -> str:
        """What clients connect to, ``unix:PATH``."""
        return f"unix:{self.socket_path}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the server answers a hello; ``KvmpError`` with its last lines when it ends or stays silent."""
        deadline = time.monotonic() + timeout_s
        while not answers(self.endpoint, deadline - time.monotonic()):
            if self.process.poll() is not None:
                raise KvmpError(
                    f"kvmp serve ended with code {self.process.returncode} before it was ready:\n{self._tail()}"
                )
            if time.monotonic() > deadline:
                raise KvmpError(f"kvmp serve (pid {self.pid}) was not ready within {timeout_s} s:\n{self._tail()}")
            time.sleep(_POLL_S)
        if self._ephemeral:
            self._own_segment = _inode(self.segment_path)

    def stop(self, timeout_s: float = _STOP_S) -> int:
        """Ask the server to drain (SIGTERM), kill it after ``timeout_s``, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End the server at once (SIGKILL), as a crash would; its segment stays until the ``with`` block ends."""
        self.process.kill()
        return self.process.wait()

    def close(self) -> None:
        """Stop the server and remove what belongs to it: its log, and its segment if that is ephemeral."""
        self.stop()
        if self._own_segment is not None and self._own_segment == _inode(self.segment_path):
            self.segment_path.unlink(missing_ok=True)  # a server that was killed could not do it
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tail(self) -> str:
        return "\n".join(self.log().splitlines()[-_LOG_LINES:]) or "(it printed nothing)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    size: str = "1GiB",
    *,
    name: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    ephemeral: bool = True,
    policy: str = "lru",
    chunk: str | None = None,
    arena_dir: str | os.PathLike[str] = "/dev/shm",
    tcp: str | None = None,
    timeout_s: float = 10.0,
    env: Mapping[str, str] | None = None,
) -> Server:
    """Start ``kvmp serve`` as a child of this process and return once it answers.

    ``name`` and ``socket`` default to fresh private ones, ``tcp`` (``HOST:PORT``) to none. An ``ephemeral`` server
    removes its segment when it ends. ``env`` is added to this process's environment. Raises ``KvmpError`` with the
    server's last lines when it is not ready within ``timeout_s`` seconds.
    """
    socket = None if socket is None else Path(socket).absolute()
    if socket is not None and answers(f"unix:{socket}", timeout_s):
        raise KvmpError(f"a server already answers at {socket}: stop it, or give launch() another socket")
    name = name or f"launch-{os.getpid()}-{secrets.token_hex(4)}"
    folder = Path(tempfile.mkdtemp(prefix="kvmp-"))
    path = socket or folder / "kvmp.sock"
    options = {"size": size, "name": name, "socket": path, "policy": policy, "chunk": chunk, "arena-dir": arena_dir}
    flags = [*_flags({**options, "tcp": tcp or "off"}), *(["--ephemeral"] if ephemeral else [])]
    server = Server(
        [sys.executable, "-m", "kvmp", "serve", *flags],
        segment=Path(arena_dir) / f"{name}.kvmp",
        socket=path,
        folder=folder,
        ephemeral=ephemeral,
        env={**os.environ, **(env or {})},
    )
    try:
        server.wait_ready(timeout_s)
    except BaseException:
        server.close()
        raise
    return server


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _flags(options: Mapping[str, object]) -> list[str]:
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def answers(endpoint: str, timeout_s: float) -> bool:
    """Whether a server takes a hello at ``endpoint`` within ``timeout_s`` seconds."""
    try:
        Client.connect(endpoint, role="tool", timeout_ms=max(1, int(timeout_s * 1000))).close()
    except ConnectError:
        return False
    return True
