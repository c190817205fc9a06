"""Kinds of value: what is allowed, in words and as a check, and how an environment variable's text becomes one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from .size import parse_size

_ENDPOINT = re.compile(r"unix:(?://)?/(?!/).+|tcp://(?P<host>\[[^]/\s]+\]|[^:/\[\]\s]+):(?P<port>[0-9]{1,5})")

_PATH_BYTES = 107  # of a socket's address, less the NUL behind it


@dataclass(frozen=True)
class Kind:
    """What one option may be.

    Attributes:
        allowed: what is allowed, as it stands in errors.
        accepts: whether a value is allowed.
        from_text: the value that a text stands for; the text itself when it stands for none, which ``accepts`` refuses.
        allowed_as_text: ``allowed`` where texts are given; the same when empty.
        spellings: the texts that are allowed, where these are few.
    """

    allowed: str
    accepts: Callable[[object], bool]
    from_text: Callable[[str], object] = str
    allowed_as_text: str = ""
    spellings: tuple[str, ...] = ()


def is_port(value: object) -> bool:
    """Whether this is a TCP port, from 1 to 65535."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65_535


def is_endpoint(value: object) -> bool:
    """Whether this names a server: ``unix:`` and an absolute path, or ``tcp://HOST:PORT``."""
    match = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return False
    if match["port"] is None:
        return "\0" not in match.string and len(os.fsencode(match.string.removeprefix("unix:"))) <= _PATH_BYTES
    return is_port(int(match["port"])) and _may_be_here(match["host"])


def _may_be_here(host: str) -> bool:
    """False for an address that is not loopback: servers answer nowhere else, for the cache is one machine's memory."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return True  # a name


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_milliseconds(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 60_000


def _is_size(value: object) -> bool:
    try:
        return isinstance(value, str) and parse_size(value) > 0
    except ValueError:
        return False


def whole(text: str) -> object:
    """The whole number that a text stands for, else the text."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _truth(text: str) -> object:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)


def choice(*values: str) -> Kind:
    """One of these texts."""
    return Kind(
        " or ".join(map(repr, values)), lambda value: isinstance(value, str) and value in values, spellings=values
    )


ENDPOINT = Kind(f"unix:/PATH (at most {_PATH_BYTES} bytes) or tcp://HOST:PORT of this machine (loopback)", is_endpoint)
FOLDER = Kind("the path of a folder", _is_path)
FILE = Kind("the path of a TOML file", _is_path)
MILLISECONDS = Kind("a whole number of milliseconds from 1 to 60000", _is_milliseconds, whole)
FLAG = Kind("true or false", lambda value: isinstance(value, bool), _truth, "true, false, 1 or 0")
SIZE = Kind("a text of a number above zero and a unit, such as '64GiB', '1.5TiB' or '500MB'", _is_size)
