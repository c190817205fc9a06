"""Where a server answers, as a user writes it, and how a server is started that answers there."""

import re
import shlex
from pathlib import PurePath

DEFAULT_PORT = 5555
DEFAULT_ENDPOINT = f"tcp://localhost:{DEFAULT_PORT}"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def serve_flags(endpoint: str) -> list[str]:
    """Flags with which ``kvmp serve`` answers at ``endpoint`` (``unix:PATH`` or ``tcp://HOST:PORT``).

    Two endpoints give two names, so that their servers do not meet in one segment. An address that is named must be
    free: a server that could not take it ends and says so.
    """
    if endpoint.startswith("unix:"):
        path = PurePath(endpoint.removeprefix("unix:"))
        return [*_name_flags(path.stem), "--socket", str(path), "--tcp", "off"]
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    name = "kvmp" if int(port) == DEFAULT_PORT else f"kvmp-{port}"
    return [*_name_flags(name), "--tcp", f"{host}:{port}"]


def start_command(endpoint: str, size: str = "4GiB") -> str:
    """The command that starts a server there, for a person to copy."""
    flags = [] if endpoint == DEFAULT_ENDPOINT else serve_flags(endpoint)
    return shlex.join(["kvmp", "serve", "--size", size, *flags])


def _name_flags(name: str) -> list[str]:
    return ["--name", name] if name != "kvmp" and _NAME.fullmatch(name) else []
