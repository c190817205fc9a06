"""Arenas may be unregistered in the background: a run ends when the last of it has been."""

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# What is left after so many seconds is reported by the fixture of tests/conftest.py.
WAIT_S = 10.0


@pytest.fixture(scope="session", autouse=True)
def _nothing_registered() -> Iterator[None]:
    yield
    gc.collect()
    deadline = time.monotonic() + WAIT_S
    while "kvmp-register" in _threads() and time.monotonic() < deadline:
        time.sleep(0.005)


def _threads() -> set[str]:
    names = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.add(path.read_text().strip())
    return names
