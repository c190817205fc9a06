"""Which key or variable of kvmp's a mistaken one was meant to be, and which are none of ours."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import SequenceMatcher

from .near import nearest
from .setting import PREFIX

_HEAD_AND_TAIL = re.compile(r"([A-Za-z0-9]+)[._:/ -]+(.*)", re.DOTALL)


def meant_key(key: object, known: Collection[str]) -> str | None:
    """The ``kvmp.*`` key that another key of the extra config is plainly meant to be.

    A known key without its prefix, or with a near miss of the prefix. ``""`` for a key with kvmp's own prefix that is
    like no known one; ``None`` for a key that belongs to someone else.
    """
    if not isinstance(key, str):
        return None
    if PREFIX + key in known:
        return PREFIX + key
    if key.lower() + "." == PREFIX:
        return ""  # its settings nested under it
    head, tail = _split(key)
    if head == "kvmp":
        return _key_of(tail, known, cutoff=0.5)
    if SequenceMatcher(None, head, "kvmp").ratio() >= 0.75:
        return _key_of(tail, known, cutoff=0.85) or None
    return nearest(key.lower(), known, cutoff=0.9) or None


def _key_of(tail: str, known: Collection[str], cutoff: float) -> str:
    # The prefix is left out of the comparison: it alone would make short names alike.
    found = nearest(tail, [key.removeprefix(PREFIX) for key in known], cutoff)
    return PREFIX + found if found else ""


def meant_variable(variable: str, known: Collection[str]) -> str:
    """The known variable that another is a near miss of; empty when there is none, or when it is known itself.

    Only names that start with the letters of KVMP are looked at, in any order: others' variables may be like ours.
    """
    head, _ = _split(variable)
    if variable in known or sorted(head) != sorted("kvmp"):
        return ""
    return nearest(variable.upper(), known, cutoff=0.85)


def _split(name: str) -> tuple[str, str]:
    match = _HEAD_AND_TAIL.fullmatch(name)
    return (match[1].lower(), match[2].lower()) if match else ("", "")
