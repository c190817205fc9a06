"""Servers one after another on one segment and one socket."""

import os
from dataclasses import dataclass
from pathlib import Path

import kvmp
from tests.engines.harness import await_backing


@dataclass(frozen=True)
class Successors:
    """An arena of 32 slots of 128 KiB, where what is evicted is granted again at once."""

    name: str
    folder: Path

    def start(self) -> kvmp.Server:
        """The next server, once it can grant every slot; the one before must have ended."""
        name = f"{self.name}-{os.getpid()}-{self.folder.name}"
        server = kvmp.launch("4MiB", chunk="2MiB", name=name, socket=self.folder / "kvmp.sock")
        await_backing(server)
        return server
