"""The connector with copies that a test can hold: for tests of what happens while a copy is part done.

Each copy of the worker's copy thread notes itself in `FOLDER/passed`, and then waits for as long as `FOLDER/hold` is
there. With `KVMP_TEST_SLOW_COPY_MS` set the connector copies one block at a time, so a hold is between two blocks.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmp import paged
from kvmp.vllm.connector import KvmpConnector

__all__ = ["FOLDER_VARIABLE", "Gate", "KvmpConnector"]

FOLDER_VARIABLE = "KVMP_TEST_GATE"


class Gate:
    """One folder, two sides: the test holds and looks, the copies pass."""

    def __init__(self, folder: Path):
        self.environment = {FOLDER_VARIABLE: str(folder), "KVMP_TEST_SLOW_COPY_MS": "1"}
        self._hold = folder / "hold"
        self._passed = folder / "passed"

    def hold(self) -> None:
        """From now on copies stop after their first block; counts start at zero."""
        self._passed.unlink(missing_ok=True)
        self._hold.touch()

    def open(self) -> None:
        self._hold.unlink(missing_ok=True)

    def passed(self, verb: str) -> int:
        """Blocks copied since the last hold; `verb` is `load` or `store`."""
        return self._passed.read_text().splitlines().count(verb) if self._passed.exists() else 0

    def pass_through(self, verb: str) -> None:
        with self._passed.open("a") as passed:
            passed.write(f"{verb}\n")
        while self._hold.exists():
            time.sleep(0.005)


def _gated(copy: Callable[..., Any], verb: str, gate: Gate) -> Callable[..., Any]:
    def gated(*args: Any, **options: Any) -> Any:
        result = copy(*args, **options)
        gate.pass_through(verb)
        return result

    return gated


if folder := os.environ.get(FOLDER_VARIABLE):
    paged.PagedKV.load = _gated(paged.PagedKV.load, "load", Gate(Path(folder)))
    paged.PagedKV.store = _gated(paged.PagedKV.store, "store", Gate(Path(folder)))
