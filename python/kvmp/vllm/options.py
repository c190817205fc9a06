"""What a user may set: the ``kvmp.*`` keys of ``kv_connector_extra_config``, parsed once into a frozen dataclass."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ENDPOINT_VARIABLE = "KVMP_ENDPOINT"
_ENDPOINT = re.compile(r"unix:.+|tcp://[^:/]+:\d{1,5}")


@dataclass(frozen=True)
class Options:
    """Settings of one connector.

    Attributes:
        endpoint: where the server answers: ``unix:PATH`` or ``tcp://HOST:PORT``.
        socket_dir: folder in which this process finds the server's socket, when it is mounted elsewhere here.
        timeout_ms: how long a request waits for the answer to its lookup, and the bound of every wait, milliseconds.
        save_decode: whether blocks filled by generated tokens are stored too.
    """

    endpoint: str = "tcp://localhost:5555"
    socket_dir: str | None = None
    timeout_ms: int = 100
    save_decode: bool = True

    @property
    def timeout_s(self) -> float:
        """``timeout_ms`` in seconds."""
        return self.timeout_ms / 1000


def _endpoint(value: Any) -> str | None:
    good = isinstance(value, str) and _ENDPOINT.fullmatch(value)
    return None if good else "unix:PATH or tcp://HOST:PORT"


def _folder(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "the path of a folder"


def _milliseconds(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 60_000
    return None if good else "a whole number of milliseconds from 1 to 60000"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


# Each check answers what is allowed when the value given is not.
_CHECKS = {
    "kvmp.endpoint": _endpoint,
    "kvmp.socket_dir": _folder,
    "kvmp.timeout_ms": _milliseconds,
    "kvmp.save_decode": _flag,
}


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _CHECKS, n=1, cutoff=0.5) or difflib.get_close_matches(
        f"kvmp.{key}", _CHECKS, n=1, cutoff=0.5
    )
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"kv_connector_extra_config: unknown key {key!r}{hint} Allowed: {', '.join(sorted(_CHECKS))}"


def _refused(where: str, value: Any, allowed: str) -> str:
    return f"{where}: {value!r} given, allowed is {allowed}"


def parse_options(extra_config: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None) -> Options:
    """Reads the connector's settings.

    Args:
        extra_config: ``kv_connector_extra_config``; its ``kvmp.endpoint`` wins over the environment.
        environ: environment in which ``KVMP_ENDPOINT`` is looked up; the process's own when not given.

    Raises:
        ValueError: an unknown key, or a value of a wrong type or range; the text names key, value and what is allowed.
    """
    given: dict[str, Any] = {}
    from_environment = (os.environ if environ is None else environ).get(ENDPOINT_VARIABLE)
    if from_environment:
        if allowed := _endpoint(from_environment):
            raise ValueError(_refused(ENDPOINT_VARIABLE, from_environment, allowed))
        given["endpoint"] = from_environment
    for key, value in (extra_config or {}).items():
        check = _CHECKS.get(key)
        if check is None:
            raise ValueError(_unknown(str(key)))
        if allowed := check(value):
            raise ValueError(_refused(f"kv_connector_extra_config[{key!r}]", value, allowed))
        given[key.removeprefix("kvmp.")] = value
    return Options(**given)
