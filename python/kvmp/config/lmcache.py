"""LMCache's own keys for the place of its server, understood as kvmp's endpoint."""

from __future__ import annotations

from collections.abc import Mapping

from .kinds import is_endpoint, is_port, whole
from .setting import refused

HOST = "lmcache.mp.host"
PORT = "lmcache.mp.port"
# What LMCache takes for the one that is not given.
_DEFAULT_HOST = "tcp://localhost"
_DEFAULT_PORT = 5555


def endpoint(extra_config: Mapping[str, object]) -> str | None:
    """The endpoint that ``lmcache.mp.host`` (``tcp://`` before it or not) and ``lmcache.mp.port`` name, if either does.

    Raises:
        ConfigError: a host or port that is none; the text names the key.
    """
    if HOST not in extra_config and PORT not in extra_config:
        return None
    return f"tcp://{_host(extra_config.get(HOST, _DEFAULT_HOST))}:{_port(extra_config.get(PORT, _DEFAULT_PORT))}"


def _host(given: object) -> str:
    host = given.removeprefix("tcp://") if isinstance(given, str) else ""
    if not is_endpoint(f"tcp://{host}:1"):
        raise refused(
            f"kv_connector_extra_config[{HOST!r}]",
            given,
            "a name of this machine or a loopback address, 'tcp://' before it or not",
        )
    return host


def _port(given: object) -> object:
    port = whole(given) if isinstance(given, str) else given
    if not is_port(port):
        raise refused(f"kv_connector_extra_config[{PORT!r}]", given, "a port from 1 to 65535")
    return port
