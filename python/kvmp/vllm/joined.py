"""A worker's membership in its scheduler's session.

followed -> joined -> left: a session that was left, by whatever cause, is never joined again. From then on the server
takes it that no copy of this part is running, and may grant its slots anew.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kvmp import errors
from kvmp.vllm import connecting
from kvmp.vllm.metadata import NamespaceRef, SessionRef

_JOIN_MS = 1000
_PING_MS = 100
# After a failure the jobs behind it fail at once; a worker tries again this much later. Seconds.
_AGAIN_S = 1.0
# Sessions left that are remembered; no job waits in the queue for so many changes of the session.
_LEFT = 1024
# The mapping of a segment that was left is kept so long for the server's next life; then its memory may go. Seconds.
_KEEP_S = 60.0
# What a server says of an engine, or a part of it, that it has closed for good.
_CLOSED = "cannot be joined"


class NotJoinedError(Exception):
    """The server cannot be reached, or is another one by now."""


class LeftError(NotJoinedError):
    """The session was left or closed: its slots may be another's by now, and nothing is owed in it."""


class RefusedError(NotJoinedError):
    """The server refuses this worker for as long as its scheduler's session lasts."""


class Membership:
    """Connects and joins; used by the copy thread only. A copy under way outlives its client, with the holder entry."""

    def __init__(
        self,
        part: int,
        layout_json: str,
        socket_dir: str | None,
        *,
        writes: bool = True,
        dma: bool = False,
        connect: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            part: index of the part that this worker has.
            writes: whether it stores it. Of ranks of equal KV one does; the server waits for none of the others.
            dma: whether copies may land after this process is gone; the server then waits a grace before it grants
                their slots anew.
        """
        self._part = part
        self._role = "worker" if writes else "reader"
        self._layout_json = layout_json
        self._socket_dir = socket_dir
        self._dma = dma
        self._connect = connect or connecting.client_connect
        self._clock = clock
        self._followed: SessionRef | None = None
        self._session: SessionRef | None = None
        self._client: Any = None
        self._namespaces: dict[NamespaceRef, Any] = {}
        self._failed: tuple[SessionRef, float, NotJoinedError] | None = None
        self._left: deque[SessionRef] = deque(maxlen=_LEFT)
        self._closed: set[int] = set()
        # The client left last, closed: the next one takes over its mapping if the segment is the same.
        self._kept: tuple[Any, float] | None = None
        # Clients whose mapping nobody takes over.
        self._dropped: list[Any] = []

    # The session in use.

    def follow(self, session: SessionRef) -> None:
        """The scheduler's session now: any other is left, so that its slots come back once its copies have ended."""
        before, self._followed = self._followed, session
        if before is not None and before != session:
            self._leave(before)
        if self._session is not None and self._session != session:
            self._leave(self._session)

    def has_left(self, session: SessionRef) -> bool:
        """Whether no store may be made in this session any more."""
        return session in self._left

    def take_closed(self) -> frozenset[int]:
        """Engine tokens with which this worker cannot go on; the scheduler side needs a new session."""
        closed, self._closed = frozenset(self._closed), set()
        return closed

    def take_dropped(self) -> list[Any]:
        """Closed clients whose mapping is kept no longer; whoever else keeps it must let go, for its memory to go."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @property
    def joined(self) -> bool:
        """Whether there is a session, alive or not."""
        return self._client is not None

    @property
    def session(self) -> SessionRef | None:
        """The session that is joined, None for none."""
        return self._session

    @property
    def client(self) -> Any:
        """The client of that session."""
        return self._client

    @property
    def lost(self) -> bool:
        """Whether the server of that session is gone or has missed a bound."""
        return self._client is None or bool(self._client.lost)

    # Before a copy.

    def join(self, session: SessionRef, namespace: NamespaceRef | None) -> None:
        """Joins before the first copy needs it.

        Raises:
            NotJoinedError: not now, or not in this session.
        """
        client = self._join_session(session)
        if namespace is not None:
            self._join_namespace(client, namespace)

    def for_store(self, session: SessionRef, namespace: NamespaceRef) -> tuple[Any, Any]:
        """(client, namespace) to store under a lease of exactly this session.

        Raises:
            NotJoinedError: there is none, or the server is another one.
        """
        client = self._join_session(session)
        if client.lost:
            self._revive(session)
        return client, self._join_namespace(client, namespace)

    def for_load(self, session: SessionRef, namespace: NamespaceRef) -> tuple[Any, Any]:
        """(client, namespace) to load from slots of this session's segment; the word check guards the rest.

        Raises:
            NotJoinedError: there is none.
        """
        joined = self._session
        if joined is not None and joined.segment_id == session.segment_id and namespace in self._namespaces:
            return self._client, self._namespaces[namespace]
        client = self._join_session(session)
        if client.segment_id != session.segment_id:
            raise NotJoinedError(f"{session.endpoint} serves another segment than the lease is of")
        return client, self._join_namespace(client, namespace)

    def _join_session(self, session: SessionRef) -> Any:
        if self._session == session:
            return self._client
        if self.has_left(session):
            raise LeftError(f"the session with {session.endpoint} that this block is of was left")
        self._fail_again(session)
        client = self._connected(session)
        if client.server_epoch != session.server_epoch:
            with contextlib.suppress(BaseException):
                client.close()
            raise self._remember(session, NotJoinedError(f"the server of {session.endpoint} was restarted meanwhile"))
        self.close()
        if self._kept is not None and self._kept[0].segment_id != client.segment_id:
            self._dropped.append(self._kept[0])
        self._session, self._client, self._kept = session, client, None
        return client

    def _connected(self, session: SessionRef) -> Any:
        try:
            return self._connect(
                session.endpoint,
                role=self._role,
                engine_token=session.engine_token,
                part=self._part,
                socket_dir=self._socket_dir,
                timeout_ms=_JOIN_MS,
                dma=self._dma,
                reuse=self._kept[0] if self._kept else self._client,
            )
        except BaseException as error:
            if isinstance(error, errors.ConnectError) and _CLOSED in str(error):
                self._give_up(session)
                raise LeftError(str(error)) from error
            raise self._remember(session, NotJoinedError(str(error))) from error

    def _join_namespace(self, client: Any, namespace: NamespaceRef) -> Any:
        handle = self._namespaces.get(namespace)
        if handle is None:
            self._fail_again(self._session)
            try:
                handle = client.join(namespace.id, namespace.digest, self._layout_json, timeout_ms=_JOIN_MS)
            except errors.NamespaceError as error:
                raise self._remember(self._session, RefusedError(str(error))) from error
            except BaseException as error:
                raise self._remember(self._session, NotJoinedError(str(error))) from error
            self._namespaces[namespace] = handle
        return handle

    def _fail_again(self, session: SessionRef) -> None:
        if self._failed is not None and self._failed[0] == session and self._clock() < self._failed[1]:
            raise self._failed[2]

    def _remember(self, session: SessionRef, error: NotJoinedError) -> NotJoinedError:
        self._failed = (session, self._clock() + _AGAIN_S, error)
        return error

    # A session that is in trouble.

    @property
    def watchful(self) -> bool:
        """Whether there is anything that `watch` looks after."""
        return self._client is not None or self._kept is not None

    def watch(self) -> None:
        """Leaves a server that is gone: until then its successor must take it that this worker still copies."""
        if self._kept is not None and self._clock() >= self._kept[1]:
            self._dropped.append(self._kept[0])
            self._kept = None
        if self._client is None or not self.lost:
            return
        with contextlib.suppress(NotJoinedError):
            self._revive(self._session)

    def _revive(self, session: SessionRef) -> None:
        """A missed bound is forgiven once a ping is answered; a hang-up is not, and the session is left."""
        self._fail_again(session)
        try:
            self._client.ping(timeout_ms=_PING_MS)
        except (errors.BoundExceeded, errors.Busy) as error:
            raise self._remember(session, NotJoinedError(str(error))) from error
        except BaseException as error:
            self._give_up(session)
            raise LeftError(str(error)) from error

    def _give_up(self, session: SessionRef) -> None:
        """Leaves a session that the scheduler may still be in."""
        self._closed.add(session.engine_token)
        self._leave(session)

    def _leave(self, session: SessionRef) -> None:
        if not self.has_left(session):
            self._left.append(session)
        if self._session == session:
            self.close()

    def close(self) -> None:
        """Leaves the server; what is still being copied is not committed any more."""
        if self._session is not None and not self.has_left(self._session):
            self._left.append(self._session)
        client, self._client, self._session, self._namespaces = self._client, None, None, {}
        if client is not None:
            with contextlib.suppress(BaseException):  # It is left behind in any case.
                client.close()
            self._kept = (client, self._clock() + _KEEP_S)
