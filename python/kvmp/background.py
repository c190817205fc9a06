"""A server in the background: started for a process, ended by itself after that process, its segment left behind.

starting -> ready -> (the process ends) -> drained
"""

import subprocess
import sys
import time

from .endpoint import serve_flags
from .errors import KvmpError
from .server import answers

_POLL_S = 0.005
# A server that found its name taken leaves this long for the one that has it to answer.
_OTHER_S = 2.0


def serve_command(size: str, endpoint: str, until_pid: int) -> list[str]:
    """``kvmp serve`` as it is started for the process ``until_pid``; ``size`` as in ``64GiB``."""
    return ["kvmp", "serve", "--size", size, *serve_flags(endpoint), "--until-pid", str(until_pid)]


def start(size: str, endpoint: str, *, until_pid: int, timeout_s: float = 10.0) -> subprocess.Popen[bytes] | None:
    """Start a server that ends with the process ``until_pid``, and return it once it answers at ``endpoint``.

    None when another one came first and answers there. The server has a session of its own, so that a Ctrl-C in the
    terminal reaches it only through the process it serves; it logs to this process's standard error.

    Raises ``KvmpError`` when it ends or is not ready within ``timeout_s`` seconds.
    """
    command = [sys.executable, "-m", *serve_command(size, endpoint, until_pid)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + timeout_s
    while not answers(endpoint, deadline - time.monotonic()):
        if process.poll() is not None:
            _await_other(endpoint, process.returncode)
            return None
        if time.monotonic() > deadline:
            process.terminate()
            raise KvmpError(f"the server started at {endpoint} was not ready within {timeout_s} s")
        time.sleep(_POLL_S)
    return process if process.poll() is None else None


def _await_other(endpoint: str, code: int) -> None:
    deadline = time.monotonic() + _OTHER_S
    while not answers(endpoint, _OTHER_S):
        if time.monotonic() > deadline:
            raise KvmpError(f"the server started at {endpoint} ended with code {code}; its last lines say why")
        time.sleep(_POLL_S)
