"""The server: whether one answers, who it is, and whether it is well."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvmp.client import Client
from kvmp.default_size import default_size
from kvmp.endpoint import socket_path, start_command
from kvmp.errors import KvmpError, NoServer, Unreachable

from .finding import Finding, fail, ok, warn
from .machine import gib

_WHAT = "server"
HELLO_MS = 2000


def connect(endpoint: str, socket_dir: str | None) -> Client | Finding:
    """A session, or why there is none."""
    try:
        return Client.connect(endpoint, role="tool", socket_dir=socket_dir, timeout_ms=HELLO_MS)
    except NoServer as error:
        if endpoint.startswith("unix:") and socket_path(endpoint).exists() and not socket_path(endpoint).is_socket():
            return fail(_WHAT, f"{endpoint} is no socket", "name another path as --endpoint")
        return warn(_WHAT, f"{error}; engines run without a cache", start_command(endpoint, _size(endpoint)))
    except Unreachable as error:
        return fail(_WHAT, str(error), "")
    except KvmpError as error:
        mend = "stop it, or give server and engine another endpoint (kvmp serve --socket PATH, kvmp.endpoint)"
        return fail(_WHAT, f"what answers at {endpoint} does not serve us: {error}", mend)


def _size(endpoint: str) -> str:
    try:
        return default_size(endpoint)
    except KvmpError:
        return "SIZE"


def socket_folder(endpoint: str, socket_dir: str | None) -> Path | None:
    """The folder in which the engine looks for the socket; None where that is the server's default."""
    if socket_dir is not None:
        return Path(socket_dir)
    return socket_path(endpoint).parent if endpoint.startswith("unix:") else None


def check(client: Client) -> Iterator[Finding]:
    """What a server that answers says of itself."""
    try:
        took_ms = client.ping(HELLO_MS) * 1000
        stats = client.stats()
    except KvmpError as error:
        yield fail(_WHAT, f"{client.endpoint} took our hello and then no request: {error}", "look at its log")
        return
    yield ok(_WHAT, f"{client.endpoint}, pid {stats['pid']}, answers in {took_ms:.3f} ms")
    yield _same_version(client.server_version)
    yield _arena(stats)
    yield _use(stats)


def _same_version(theirs: str) -> Finding:
    ours = version("kvmp")
    if ours == theirs:
        return ok("server version", theirs)
    return warn("server version", f"{theirs}; this wheel is {ours}", "restart the server from this wheel")


def _arena(stats: dict[str, Any]) -> Finding:
    arena, backed = stats["arena_bytes"], stats["backed_bytes"]
    says = f"{gib(arena)}, {gib(backed)} of it backed by memory"
    if backed < arena and not stats["warming"]:
        return warn("arena", f"{says}: memory ran out while it grew", "free memory, or serve with a smaller --size")
    return ok("arena", says + (", growing" if stats["warming"] else ""))


def _use(stats: dict[str, Any]) -> Finding:
    return ok(
        "in use",
        f"{stats['blocks_ready']} blocks of {stats['namespaces']} namespaces, {stats['engines']} engines attached, "
        f"{stats['lookup_hit_blocks']} of {stats['lookup_blocks']} blocks looked up were found",
    )
