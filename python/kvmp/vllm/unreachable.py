"""What an engine does when no server answers: `kvmp.on_unreachable` is degrade, fail or spawn.

- *degrade*: the engine runs without a cache and attaches when a server comes (`link`).
- *fail*: it does not start. A server that goes later costs it the cache, never its life.
- *spawn*: it starts a server of `kvmp.spawn_size`, which ends with the engine and leaves its segment.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time

from kvmp import background
from kvmp.config import ConnectorConfig
from kvmp.endpoint import start_command
from kvmp.errors import ConnectError, KvmpError, NoServer
from kvmp.vllm import connecting

_HELLO_MS = 1000
_PAUSE_FIRST_S = 1.0
_PAUSE_LAST_S = 60.0


def demand_server(options: ConnectorConfig) -> None:
    """Refuses the start where the user wants no engine without its cache.

    Raises:
        ConnectError: no server serves us, and `kvmp.on_unreachable` is "fail".
    """
    if options.on_unreachable != "fail":
        return
    try:
        client = connecting.client_connect(
            options.endpoint, role="tool", socket_dir=options.socket_dir, timeout_ms=_HELLO_MS
        )
    except KvmpError as error:
        mend = (
            f"this starts one: {start_command(options.endpoint)}"
            if isinstance(error, NoServer)
            else f"give it a server of its own at another kvmp.endpoint than {options.endpoint}"
        )
        raise ConnectError(
            f"kvmp: {error}. The engine does not start without a server, for kvmp.on_unreachable is 'fail'; {mend}"
        ) from error
    client.close()


class Spawner:
    """Starts a server for this process where the user asked for that; after a failure it waits before the next try."""

    def __init__(self, options: ConnectorConfig, logger: logging.Logger):
        self._options = options
        self._logger = logger
        self._pause_s = _PAUSE_FIRST_S
        self._not_before = 0.0
        self._warned = False
        self._server: subprocess.Popen[bytes] | None = None  # kept, so that one that ended is reaped at the next start

    def start(self) -> bool:
        """Whether a server is there now; waits until it answers, so never called on an engine's thread."""
        size = self._options.spawn_size
        if self._options.on_unreachable != "spawn" or size is None or time.monotonic() < self._not_before:
            return False
        try:
            place, folder = self._options.endpoint, self._options.socket_dir
            self._server = background.start(size, place, until_pid=os.getpid(), socket_dir=folder)
        except (KvmpError, OSError) as error:
            self._warn(error)
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _PAUSE_LAST_S)
            return False
        self._pause_s, self._warned = _PAUSE_FIRST_S, False
        if self._server is not None:
            what = (size, self._server.pid, self._options.endpoint)
            self._logger.info("kvmp: started a server of %s (pid %d) at %s", *what)
        return True

    def _warn(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            text = "kvmp: no server could be started at %s: %s; tried again, ever more seldom"
            self._logger.warning(text, self._options.endpoint, error)
