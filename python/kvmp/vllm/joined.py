"""A worker's membership in its scheduler's session: joined before its first copy, anew when the session changes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from kvmp.vllm.metadata import NamespaceRef, SessionRef

_JOIN_MS = 1000
_PING_MS = 100
# After a failure the jobs behind it fail at once; a worker tries again this much later. Seconds.
_AGAIN_S = 1.0


class NotJoinedError(Exception):
    """The server cannot be reached, or is another one by now."""


class RefusedError(NotJoinedError):
    """The server refuses this worker for as long as its scheduler's session lasts."""


class Membership:
    """Connects and joins; used by the copy thread only, so a client is closed only when no copy of it runs."""

    def __init__(
        self,
        part: int,
        layout_json: str,
        socket_dir: str | None,
        *,
        connect: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._part = part
        self._layout_json = layout_json
        self._socket_dir = socket_dir
        self._connect = connect or _client_connect
        self._clock = clock
        self._session: SessionRef | None = None
        self._client: Any = None
        self._namespaces: dict[NamespaceRef, Any] = {}
        self._failed: tuple[SessionRef, float, NotJoinedError] | None = None

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
        self._fail_again(session)
        try:
            client = self._connect(
                session.endpoint,
                role="worker",
                engine_token=session.engine_token,
                part=self._part,
                socket_dir=self._socket_dir,
                timeout_ms=_JOIN_MS,
            )
        except BaseException as error:
            raise self._remember(session, NotJoinedError(str(error))) from error
        if client.server_epoch != session.server_epoch:
            with contextlib.suppress(BaseException):
                client.close()
            raise self._remember(session, NotJoinedError(f"the server of {session.endpoint} was restarted meanwhile"))
        self.close()
        self._session, self._client = session, client
        return client

    def _revive(self, session: SessionRef) -> None:
        self._fail_again(session)
        if (error := self._ping()) is not None:
            raise self._remember(session, NotJoinedError(str(error))) from error

    def _ping(self) -> BaseException | None:
        """A missed bound is forgiven once a ping is answered; a hang-up is not, and the session is left."""
        from kvmp.errors import BoundExceeded

        try:
            self._client.ping(timeout_ms=_PING_MS)
        except BoundExceeded as error:
            return error
        except BaseException as error:
            self.close()
            return error
        return None

    @property
    def joined(self) -> bool:
        """Whether there is a session, alive or not."""
        return self._client is not None

    def watch(self) -> None:
        """Leaves a server that is gone: until then its successor must take it that this worker still copies."""
        if self._client is not None and self._client.lost:
            self._ping()

    def _join_namespace(self, client: Any, namespace: NamespaceRef) -> Any:
        from kvmp.errors import NamespaceError

        handle = self._namespaces.get(namespace)
        if handle is None:
            self._fail_again(self._session)
            try:
                handle = client.join(namespace.id, namespace.digest, self._layout_json, timeout_ms=_JOIN_MS)
            except NamespaceError as error:
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

    def close(self) -> None:
        """Leaves the server; every copy must have ended."""
        client, self._client, self._session, self._namespaces = self._client, None, None, {}
        if client is not None:
            with contextlib.suppress(BaseException):  # It is left behind in any case.
                client.close()


def _client_connect(endpoint: str, **kwargs: Any) -> Any:
    from kvmp.client import Client

    return Client.connect(endpoint, **kwargs)
