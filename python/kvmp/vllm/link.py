"""The scheduler's connection, kept in the background so that no step of the engine ever waits for it.

Down -> (connect, open) -> Up -> (hang-up or missed bound) -> Lost -> (ping answered) -> Up, or -> Down.
                           Up -> (a worker cannot go on in this session) -> Down.

The engine's thread only reads `namespace()` and `session`; every call that can wait is made by this module's thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvmp import errors
from kvmp.config import ConnectorConfig
from kvmp.endpoint import start_command
from kvmp.namespace import NamespaceSpec
from kvmp.vllm import connecting
from kvmp.vllm.metadata import NamespaceRef, SessionRef
from kvmp.vllm.spec import SpecRefusedError
from kvmp.vllm.unreachable import Spawner
from kvmp.vllm.weights import adapter_digest

# A hang-up is seen at the latest this much later; a missed bound wakes the thread at once. Seconds.
_WATCH_S = 0.2
_RETRY_FIRST_S = 0.1
_RETRY_LAST_S = 1.0
_CONNECT_MS = 1000
_JOIN_S = 2.0
# Key of the namespace of plain requests; adapters have their content digest.
PLAIN = ""


@dataclass(frozen=True)
class Session:
    """One attachment to a server.

    Attributes:
        client: the `kvmp.Client`.
        ref: what a worker needs to join.
    """

    client: Any
    ref: SessionRef


@dataclass(frozen=True, eq=False)
class OpenNamespace:
    """A namespace opened in a session; compared by identity, so that a new session or salt is a new one.

    Attributes:
        session: the session it was opened in.
        handle: what the client gave.
        ref: what a worker needs to join.
    """

    session: Session
    handle: Any
    ref: NamespaceRef


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as vLLM names it; vLLM loads it once for each of these."""

    lora_id: int
    name: str
    path: str


class Link:
    """Attaches, re-attaches and opens namespaces, on a thread of its own."""

    def __init__(
        self,
        options: ConnectorConfig,
        make_spec: Callable[[], NamespaceSpec],
        logger: logging.Logger,
        *,
        readers: bool = False,
        connect: Callable[..., Any] | None = None,
        switch_off: Callable[[str], None],
    ):
        """
        Args:
            make_spec: builds the namespace spec of plain requests; called once, in the background.
            readers: whether some ranks join as readers, of a part that another rank writes.
            connect: `kvmp.Client.connect`, or what stands in for it.
            switch_off: called with the reason when this engine can never be served.
        """
        self._options = options
        self._make_spec = make_spec
        self._spec: NamespaceSpec | None = None
        self._logger = logger
        self._readers = readers
        self._connect = connect or connecting.client_connect
        self._switch_off = switch_off
        self._spawner = Spawner(options, logger)
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._stopping = False
        self._warned = False
        self._salt = ""
        self._salts = itertools.count()
        self._salt_serial = next(self._salts)
        self._up = False
        self._session: Session | None = None
        self._closed: Session | None = None
        self._open: dict[str, OpenNamespace] = {}
        self._wanted: dict[str, Adapter | None] = {PLAIN: None}
        self._adapters: dict[Adapter, str | None] = {}
        self._not_opened: set[Adapter] = set()
        self._thread: threading.Thread | None = None

    # What the engine's thread uses; none of it waits.

    def start(self) -> None:
        """Begins to attach."""
        self._thread = threading.Thread(target=self._run, name="kvmp-link", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether a server is there that answers in time."""
        return self._up

    @property
    def session(self) -> SessionRef | None:
        """The session in use, None while there is none."""
        session = self._session
        return session.ref if session and self._up else None

    def namespace(self, adapter: Adapter | None = None) -> OpenNamespace | None:
        """The open namespace of a request with this adapter, None while there is none; asking for it has it opened."""
        if not self._up:
            return None
        if adapter is None:
            return self._open.get(PLAIN)
        key = self._adapters.get(adapter, "")
        if not key:
            if adapter not in self._adapters:
                self._want(adapter)
            return None
        return self._open.get(key)

    def mark_lost(self, session: Session) -> None:
        """A bound was missed in this session: nobody asks the server anything until it has answered a ping."""
        if session is self._session:
            self._up = False
            self._wake.set()

    def renew(self, closed: frozenset[int]) -> None:
        """Leaves the session if its engine token is among those closed to a worker; a new one is made."""
        session = self._session
        if session is not None and session.ref.engine_token in closed:
            self._up, self._closed = False, session
            self._wake.set()

    def new_salt(self) -> None:
        """Goes on in fresh namespaces: what is stored from now on is found only by this engine, until it ends."""
        with self._lock:
            self._salt = secrets.token_hex(16)
            self._salt_serial = next(self._salts)
            self._open = {}
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread and the session."""
        self._stopping, self._up = True, False
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _want(self, adapter: Adapter) -> None:
        with self._lock:
            self._adapters[adapter] = None
            self._wanted[f"{adapter.lora_id}\0{adapter.name}\0{adapter.path}"] = adapter
        self._wake.set()

    # The background thread.

    def _run(self) -> None:
        pause = _RETRY_FIRST_S
        while not self._stopping:
            if self._tend():
                pause, wait = _RETRY_FIRST_S, _WATCH_S
            else:
                wait, pause = pause, min(2 * pause, _RETRY_LAST_S)
            self._wake.wait(wait)
            self._wake.clear()
        self._drop_session()

    def _tend(self) -> bool:
        """One look at the connection; True when it is up."""
        try:
            if self._session is not None and self._session is self._closed:
                self._drop_session()
                return False
            if self._session is None:
                self._attach()
            elif not self._up or self._session.client.lost:
                self._revive()
            self._open_wanted()
            return self._up
        except SpecRefusedError as refused:
            self._stopping = True
            self._switch_off(str(refused))
        except BaseException as error:  # No server, a refusal, a broken session: try again, engine unharmed.
            self._drop_session()
            if not self._stopping:
                self._warn(error)
        return False

    def _attach(self) -> None:
        if self._spec is None:
            self._spec = self._make_spec()
        client = self._reach()
        self._check_readers(client)
        ref = SessionRef(client.endpoint, client.engine_token, client.server_epoch, client.segment_id)
        with self._lock:
            self._session = Session(client, ref)
            self._open = {}
        self._not_opened.clear()
        # Adapters are opened later, one by one: what one of them lacks is not the others' loss.
        self._open_one(self._session, self._spec, None)
        self._up, self._warned = True, False
        self._logger.info("kvmp: attached to %s", ref.endpoint)

    def _check_readers(self, client: Any) -> None:
        """Where readers are refused, every load would fail on their ranks."""
        if not self._readers or "readers" in client.features:
            return
        client.close()
        raise errors.ConnectError(
            f"{client.endpoint} is a server of kvmp {client.server_version}, which lets no ranks of equal KV share a "
            "part; start one of this version (kvmp serve --upgrade)"
        )

    def _reach(self) -> Any:
        try:
            return self._dial()
        except errors.NoServer:
            if not self._spawner.start():
                raise
            return self._dial()

    def _dial(self) -> Any:
        return self._connect(
            self._options.endpoint, role="scheduler", socket_dir=self._options.socket_dir, timeout_ms=_CONNECT_MS
        )

    def _revive(self) -> None:
        self._up = False
        try:
            self._session.client.ping(timeout_ms=self._options.timeout_ms)
        except (errors.BoundExceeded, errors.Busy) as error:
            # Frozen or swamped, not gone: its session, and what it pins for us, are worth keeping.
            self._warn(error)
            return
        if self._warned:
            self._logger.info("kvmp: %s answers again", self._session.ref.endpoint)
        self._up, self._warned = True, False

    def _drop_session(self) -> None:
        self._up, self._closed = False, None
        session, self._session = self._session, None
        with self._lock:
            self._open = {}
        if session is not None:
            self._leave(session)

    def _leave(self, session: Session) -> None:
        try:
            session.client.close()
        except BaseException as error:  # A session that cannot even be closed must not end this thread.
            self._logger.debug("kvmp: closing a session failed: %s", error)

    def _warn(self, error: BaseException) -> None:
        if self._warned:
            return
        self._warned = True
        endpoint = self._options.endpoint
        if isinstance(error, errors.NoServer):
            text = "kvmp: %s. The engine runs without its cache and attaches when a server comes; this starts one: %s"
            self._logger.warning(text, error, start_command(endpoint))
        else:
            text = "kvmp: %s does not serve this engine (%s); it runs without its cache, and tries again by itself"
            self._logger.warning(text, endpoint, error)

    def _open_wanted(self) -> None:
        session, spec = self._session, self._spec
        if session is None or spec is None:
            return
        for adapter in list(self._wanted.values()):
            if adapter is None:
                self._open_one(session, spec, None)
            elif adapter not in self._not_opened:
                self._open_adapter(session, spec, adapter)

    def _open_adapter(self, session: Session, spec: NamespaceSpec, adapter: Adapter) -> None:
        """An adapter that the server refuses costs its own requests the cache, for this session, and nobody else's."""
        try:
            self._open_one(session, spec, adapter)
        except errors.NamespaceError as error:
            self._not_opened.add(adapter)
            self._logger.warning(
                "kvmp: LoRA adapter %s: the server refuses its namespace (%s); its requests are not cached",
                adapter.name,
                error,
            )

    def _open_one(self, session: Session, spec: NamespaceSpec, adapter: Adapter | None) -> None:
        key = PLAIN if adapter is None else self._adapter_key(adapter)
        if key is None or key in self._open:
            return
        serial, salt = self._salt_serial, self._salt
        if adapter is not None:
            spec = dataclasses.replace(spec, facts={**spec.facts, "adapter_sha256": key})
        spec = dataclasses.replace(spec, salt=salt)
        handle = session.client.open(spec, timeout_ms=_CONNECT_MS)
        opened = OpenNamespace(session, handle, NamespaceRef(handle.id, spec.digest()))
        with self._lock:
            # A reset that came meanwhile has named another salt: this namespace must not be used.
            if serial == self._salt_serial and session is self._session:
                self._open[key] = opened

    def _adapter_key(self, adapter: Adapter) -> str | None:
        """The adapter's content digest, None when it cannot be had: its requests are neither looked up nor stored."""
        known = self._adapters.get(adapter)
        if known is not None:
            return known
        try:
            digest = adapter_digest(adapter.path)
        except OSError as error:
            self._logger.warning(
                "kvmp: LoRA adapter %s: its files cannot be read (%s); its requests are not cached", adapter.name, error
            )
            with self._lock:
                self._wanted = {key: other for key, other in self._wanted.items() if other != adapter}
            return None
        self._adapters[adapter] = digest
        return digest
