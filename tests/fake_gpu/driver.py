"""The fake driver, built and loaded in the place of libcuda."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("driver.c")


def build(folder: Path, *flags: str) -> Path:
    """Compiles it; ``-DBEFORE_12_8`` leaves batched copies out."""
    library = folder / f"fake{''.join(flags)}.so"
    command = ["cc", "-shared", "-fPIC", "-O1", *flags, "-Wl,-soname,libcuda.so", "-o", library, SOURCE, "-pthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Driver:
    """What this process takes for libcuda.so from now on: its counters, and what it is told to hold."""

    holds_ends: int
    holds_registering: int
    fails: int

    registering: int  # registrations begun
    registers: int  # and ended
    registered_mib: int  # by all of them
    unregisters: int
    unregistering_thread: int  # of the last one
    calls: int
    waiting: int  # for the driver's lock
    queries: int  # of an event
    allocations: int  # that are not freed
    events: int  # that are not destroyed

    def __init__(self, library: str):
        # By its soname it is found before any libcuda.so on this machine.
        object.__setattr__(self, "_library", ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL))

    def _variable(self, name: str) -> Any:
        return ctypes.c_int.in_dll(self._library, f"fake_{name}")

    def __getattr__(self, name: str) -> int:
        return int(self._variable(name).value)

    def __setattr__(self, name: str, value: int) -> None:
        self._variable(name).value = value

    def end(self) -> None:
        """All copies that were submitted end now."""
        self._library.fake_end()
