"""Where a server answers, as a user writes it, and how a server is started that answers there."""

import hashlib
import os
import re
import shlex
from pathlib import Path

from ._kvmp import default_socket

DEFAULT_PORT = 5555
DEFAULT_ENDPOINT = f"tcp://localhost:{DEFAULT_PORT}"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,39}")
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[::1\]")


def server_name(endpoint: str) -> str:
    """The name of the server that is started for ``endpoint``: two endpoints give two names, and so two segments."""
    if not endpoint.startswith("unix:"):
        port = int(endpoint.rpartition(":")[2])
        return "kvmp" if port == DEFAULT_PORT else f"kvmp-{port}"
    path = _path(endpoint)
    stem = path.stem if _NAME.fullmatch(path.stem) else "kvmp"
    if path == Path(default_socket(stem)):
        return stem  # there the socket has the server's name
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def serve_flags(endpoint: str) -> list[str]:
    """Flags with which ``kvmp serve`` answers at ``endpoint`` (``unix:PATH`` or ``tcp://HOST:PORT``).

    An address that is named must be free: a server that could not take it ends and says so.
    """
    name = server_name(endpoint)
    flags = [] if name == "kvmp" else ["--name", name]
    if endpoint.startswith("unix:"):
        return [*flags, "--socket", str(_path(endpoint)), "--tcp", "off"]
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    # Servers answer on loopback only, which another name of this machine may stand for.
    return [*flags, "--tcp", f"{host if _LOOPBACK.fullmatch(host) else '127.0.0.1'}:{port}"]


def start_command(endpoint: str, size: str = "4GiB") -> str:
    """The command that starts a server there, for a person to copy."""
    flags = [] if endpoint == DEFAULT_ENDPOINT else serve_flags(endpoint)
    return shlex.join(["kvmp", "serve", "--size", size, *flags])


def _path(endpoint: str) -> Path:
    return Path(endpoint.removeprefix("unix:"))
