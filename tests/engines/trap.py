"""A trap in which a server is caught at an exact moment of an engine's: one folder, two sides.

armed -> sprung: at the moment the server stands still, the request is sent, and only then is the server killed, if it
is to be. So the request is under way, unanswered, when the server goes.
"""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvmp.errors import KvmpError
from tests.engines.harness import until
from tests.stopping import stands_still, stop

T = TypeVar("T")

OWN_BOUND_MS = 2000
"""Of each of the calls with which a `wait` trap keeps the engine's thread waiting."""


@dataclass(frozen=True)
class Sprung:
    """What was seen at the moment."""

    sent: int
    """Requests of the engine's session that are under way, by the client's count: answers are taken in by a send."""
    stood_still: bool
    """Whether the server could not have answered."""


class Trap:
    def __init__(self, folder: Path):
        self._armed, self._sprung = folder / "armed", folder / "sprung"

    # ---- the test's side

    def arm(self, moment: str, server: int, *, kill: bool = False) -> None:
        """Set it for the next `lookup`, `reserve` or `wait`, and for the process `server`."""
        self._sprung.unlink(missing_ok=True)
        self._armed.with_suffix(".new").write_text(json.dumps({"moment": moment, "server": server, "kill": kill}))
        self._armed.with_suffix(".new").rename(self._armed)

    def sprung(self) -> Sprung:
        """What was seen, once it has sprung."""
        until(self._sprung.exists, "the moment that the trap is set for")
        return Sprung(**json.loads(self._sprung.read_text()))

    # ---- the engine's side

    def pass_over(self, moment: str, client: Any, send: Callable[[], T]) -> T:
        """`send()`, with the server caught if this is the moment."""
        armed = json.loads(self._armed.read_text()) if self._armed.exists() else {}
        if armed.get("moment") != moment:
            return send()
        self._armed.unlink()
        stop(armed["server"])
        if moment == "wait":
            _wait(client)
        result = send()
        seen = {"sent": client.open_requests, "stood_still": stands_still(armed["server"])}
        if armed["kill"]:
            os.kill(armed["server"], signal.SIGKILL)
        self._sprung.with_suffix(".new").write_text(json.dumps(seen))
        self._sprung.with_suffix(".new").rename(self._sprung)
        return result


def _wait(client: Any) -> None:
    """What no hook does: calls that wait, on the engine's thread."""
    for _ in range(10):
        with suppress(KvmpError):
            client.ping(timeout_ms=OWN_BOUND_MS)
