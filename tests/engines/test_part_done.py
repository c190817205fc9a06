"""Aborts and deaths while a copy is part done, held there: nothing wrong is ever read, nothing stays behind.

Every test first sees that at least one block of the copy has passed and that not all have.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import kvmp
from demo.engine import Engine, EngineError
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, Reference, forget, loaded_tokens, random_prompt, stats, until
from tests.engines.held_copies import Gate

BLOCKS = 10
TOKENS = BLOCKS * BLOCK + 5


@dataclass(frozen=True)
class Scene:
    server: kvmp.Server
    gate: Gate
    engine: Engine
    """Its copies stop at the gate."""
    start_again: "type[None]"


@dataclass(frozen=True)
class Restartable:
    """A server on a segment and a socket of its own, so that its successor takes over both."""

    folder: Path
    name: str

    def start(self) -> kvmp.Server:
        # 32 blocks of 128 KiB: what was evicted is granted again at once
        return kvmp.launch("4MiB", chunk="2MiB", name=self.name, socket=self.folder / "kvmp.sock", ephemeral=True)
