"""The client of a kvmp server: sessions, namespaces, leases.

Life of a session: ``Client.connect`` -> ``open`` (scheduler) or ``join`` (worker) -> requests -> ``close``.
``submit_*`` and ``poll`` never wait, but for a moment that a lookup's ``poll`` may be given, and keep the GIL; every
other call waits at most ``timeout_ms`` without it.

A call that passes its bound raises :class:`~kvmp.errors.BoundExceeded` and marks the session *lost*; until a
``ping`` is answered every call raises :class:`~kvmp.errors.ServerLost` at once. A hang-up is for good: connect anew.
Replies that come late are settled by the client: the leases they granted are released or cancelled.
:func:`limit_waits` gives a thread one budget for all calls that it makes, and says what they have waited.

A client does not pass through ``fork()``: in a forked child every call raises :class:`~kvmp.errors.KvmpError`.
"""

from enum import IntEnum

from ._kvmp import (
    BlockLayout,
    Client,
    Namespace,
    PendingLookup,
    PendingReserve,
    ReadLease,
    WriteLease,
    limit_waits,
)

__all__ = [
    "Answer",
    "BlockLayout",
    "Client",
    "Namespace",
    "PendingLookup",
    "PendingReserve",
    "ReadLease",
    "WriteLease",
    "limit_waits",
]


class Answer(IntEnum):
    """What a reserve says of one hash."""

    GRANTED = 0
    """A slot to write."""
    PRESENT = 1
    """Already stored."""
    PENDING = 2
    """Somebody is writing it."""
    NO_PARENT = 3
    """The block before it is neither stored nor being written."""
    NO_SPACE = 4
    """No slot, and nothing may be evicted; or beyond what one call reserves (16,384 hashes)."""
    NOT_ADMITTED = 5
    """The policy does not want it."""
    WARMING = 6
    """No slot yet: the server is still backing its memory."""
