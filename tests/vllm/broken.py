"""What a client can do wrong: everything that it has, found by reflection, failing with every error there is."""

from __future__ import annotations

import fakes

from kvmp import errors
from kvmp.client import Client


class Bad:
    """Whatever is done with it raises."""

    def __init__(self, error: BaseException):
        object.__setattr__(self, "_error", error)

    def _raise(self, *args, **kwargs):
        raise object.__getattribute__(self, "_error")

    __getattr__ = __call__ = __len__ = __iter__ = __bool__ = __int__ = _raise
    __lt__ = __gt__ = __add__ = __radd__ = __sub__ = __getitem__ = _raise


class Panic(BaseException):
    """As PyO3 raises a panic in Rust: no `Exception`."""


def public(kind: type) -> list[str]:
    """Everything of a class that a caller may use."""
    return sorted(name for name in dir(kind) if not name.startswith("_"))


OF_KVMP: list[BaseException] = [getattr(errors, name)(f"a {name}") for name in errors.__all__]
FOREIGN: list[BaseException] = [Panic("rust"), MemoryError(), AttributeError("x"), KeyError(1), OSError("disk")]
ERRORS = OF_KVMP + FOREIGN
RUBBISH = (None, -1, "rubbish", b"", 2**64)

METHODS = [name for name in public(Client) if name != "connect"]
# What the connector's own threads and hooks call: these fail with every error, the others with the first ones.
CALLED = ("submit_lookup", "submit_reserve", "commit", "abort", "ping", "open", "join", "close", "lost")
FIRST = [Panic("rust"), errors.ServerLost("gone"), errors.BoundExceeded("late"), KeyError(1)]


class FailingClient(fakes.FakeClient):
    """A session in which one method fails, or answers rubbish."""

    broken = ""
    error: BaseException | None = None
    rubbish: object = None

    def __getattribute__(self, name):
        kind = type(self)
        if name != kind.broken:
            return super().__getattribute__(name)
        if kind.error is not None:
            return Bad(kind.error)
        if name in _VALUES:
            return kind.rubbish
        return lambda *args, **kwargs: kind.rubbish


_VALUES = {name for name in METHODS if type(vars(Client)[name]).__name__ == "getset_descriptor"}
