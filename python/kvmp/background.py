"""A server in the background: started for a process, ended by itself after that process, its segment left behind.

starting -> ready -> (the process ends) -> drained
"""

import subprocess
import sys
import time

from .client import Client
from .endpoint import serve_flags
from .errors import KvmpError

_POLL_S = 0.005
_HELLO_MS = 1000
# A server that found its name taken leaves this long for the one that has it to answer.
_OTHER_S = 2.0
# What one that is not wanted has to drain before it is killed.
_END_S = 10.0


def serve_command(size: str, endpoint: str, until_pid: int) -> list[str]:
    """``kvmp serve`` as it is started for the process ``until_pid``; ``size`` as in ``64GiB``."""
    return ["kvmp", "serve", "--size", size, *serve_flags(endpoint), "--until-pid", str(until_pid)]


def start(
    size: str, endpoint: str, *, until_pid: int, socket_dir: str | None = None, timeout_s: float = 10.0
) -> subprocess.Popen[bytes] | None:
    """Start a server that ends with the process ``until_pid``, and return it once it answers at ``endpoint``.

    None when another one came first and answers there. ``socket_dir`` is where its socket is looked for, when not at
    its own path, as for ``Client.connect``. The server has a session of its own, so that a Ctrl-C in the terminal
    reaches it only through the process it serves; it logs to this process's standard error.

    Raises ``KvmpError`` when it ends or is not ready within ``timeout_s`` seconds.
    """
    command = [sys.executable, "-m", *serve_command(size, endpoint, until_pid)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        pid = _await_pid(process, endpoint, socket_dir, timeout_s)
    except BaseException:
        _end(process)
        raise
    if pid == process.pid:
        return process
    _end(process)
    return None


def _await_pid(process: "subprocess.Popen[bytes]", endpoint: str, socket_dir: str | None, timeout_s: float) -> int:
    """The pid of the server that answers there, ``process`` or one that was faster."""
    deadline = time.monotonic() + timeout_s
    ended_at: float | None = None
    while (pid := _pid_at(endpoint, socket_dir)) is None:
        now = time.monotonic()
        if ended_at is None and process.poll() is not None:
            ended_at = now  # it found its name or address taken: whoever has it may be about to answer
        if ended_at is not None and now > ended_at + _OTHER_S:
            raise KvmpError(
                f"the server started at {endpoint} ended with code {process.returncode}; its last lines say why"
            )
        if now > deadline:
            where = f" (looked for in {socket_dir})" if socket_dir else ""
            raise KvmpError(f"the server started at {endpoint} was not ready within {timeout_s} s{where}")
        time.sleep(_POLL_S)
    return pid


def _pid_at(endpoint: str, socket_dir: str | None) -> int | None:
    """The pid of the server that answers there; None while none does."""
    try:
        with Client.connect(endpoint, role="tool", socket_dir=socket_dir, timeout_ms=_HELLO_MS) as client:
            return int(client.stats(timeout_ms=_HELLO_MS)["pid"])
    except KvmpError:
        return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
