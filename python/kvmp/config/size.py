"""Sizes as people write them: ``64GiB``, ``500MB``, ``4096``; the rules of ``kvmp serve --size``."""

from __future__ import annotations

import math
import re

_NUMBER_AND_UNIT = re.compile(r"([0-9.]*)(.*)", re.DOTALL)
_BYTES_LIMIT = 2**64  # the server counts bytes in 64 bits
_SCALE = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _SCALE |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_size(given: str) -> int:
    """A size in bytes. A number alone is bytes; ``K``, ``M``, ``G``, ``T`` alone are powers of 1024.

    Raises:
        ValueError: no size; the text says how to write one.
    """
    bytes_ = _bytes(given.strip())
    if bytes_ is None:
        raise ValueError(f"{given!r} is no size: write a number and a unit, as in 64GiB, 1.5TiB or 500MB")
    return bytes_


def _bytes(text: str) -> int | None:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    number, unit = match.groups() if match else ("", "")
    scale = _SCALE.get(unit.strip().upper()) if unit.isascii() else None
    if scale is None:
        return None
    try:
        size = int(number) * scale if number.isdecimal() else float(number) * scale
    except ValueError:
        return None
    return int(size) if math.isfinite(size) and size < _BYTES_LIMIT else None


def size_text(bytes_: int) -> str:
    """A size that ``parse_size`` reads back exactly: in GiB when whole, else in bytes."""
    gib, rest = divmod(bytes_, 1 << 30)
    return str(bytes_) if rest else f"{gib}GiB"
