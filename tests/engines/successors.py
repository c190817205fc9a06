"""Servers one after another on one segment and one socket."""

import os
from dataclasses import dataclass
from pathlib import Path

import kvmp
from tests.engines.harness import await_backing
from tests.serving import serve, take_over

_SIZE, _CHUNK = "4MiB", "2MiB"


@dataclass(frozen=True)
class Successors:
    """An arena of 32 slots of 128 KiB, where what is evicted is granted again at once."""

    label: str
    folder: Path

    @property
    def _name(self) -> str:
        return f"{self.label}-{os.getpid()}-{self.folder.name}"

    def start(self) -> kvmp.Server:
        """The next server, once it can grant every slot; the one before must have ended."""
        server = serve(_SIZE, name=self._name, socket=self.folder / "kvmp.sock", chunk=_CHUNK)
        await_backing(server)
        return server

    def upgrade(self, old: kvmp.Server) -> kvmp.Server:
        """The next server, by a warm takeover from the one that runs, which has ended then."""
        server = take_over(old, _SIZE, name=self._name, chunk=_CHUNK)
        old.close()
        return server

    def end(self, last: kvmp.Server) -> None:
        """Nothing is left of any of them."""
        last.close()
        last.segment_path.unlink(missing_ok=True)
