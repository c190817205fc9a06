"""Where a server answers, as a user writes it, and how a server is started that answers there."""

import hashlib
import os
import re
import shlex
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from ._kvmp import default_socket

DEFAULT_PORT = 5555
DEFAULT_ENDPOINT = f"tcp://localhost:{DEFAULT_PORT}"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,39}")


def server_name(endpoint: str) -> str:
    """The name of the server that is started for ``endpoint``: two endpoints give two names, and so two segments."""
    if not endpoint.startswith("unix:"):
        port = int(endpoint.rpartition(":")[2])
        return "kvmp" if port == DEFAULT_PORT else f"kvmp-{port}"
    path = socket_path(endpoint)
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
        return [*flags, "--socket", str(socket_path(endpoint)), "--tcp", "off"]
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return [*flags, "--tcp", f"{_listening_address(host)}:{port}"]


def _listening_address(host: str) -> str:
    """Servers answer on loopback only: the host itself, or the first such address that its name stands for."""
    if host == "localhost" or _is_loopback(host.strip("[]")):
        return host
    with suppress(OSError):
        for *_, (address, *_) in socket.getaddrinfo(host, None, socket.AF_INET):
            if _is_loopback(str(address)):
                return str(address)
    return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def start_command(endpoint: str, size: str = "4GiB") -> str:
    """The command that starts a server there, for a person to copy."""
    flags = [] if endpoint == DEFAULT_ENDPOINT else serve_flags(endpoint)
    return shlex.join(["kvmp", "serve", "--size", size, *flags])


def socket_path(endpoint: str) -> Path:
    """The path of a ``unix:PATH`` or ``unix://PATH`` endpoint."""
    return Path(endpoint.removeprefix("unix:").removeprefix("//"))
