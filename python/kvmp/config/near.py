"""The nearest known spelling of a mistaken name or value."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The known name that is most like this one; empty when none is like it."""
    return next(iter(get_close_matches(name, known, n=1, cutoff=cutoff)), "")


def did_you_mean(name: str) -> str:
    """The middle of an error's text, which ends its sentence."""
    return f"; did you mean {name!r}?" if name else "."
