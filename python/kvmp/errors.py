"""The one tree of exceptions; the classes are made in Rust, but for `ConfigError`.

::

    KvmpError(RuntimeError)
    ├── ConnectError      no server, refused (uid, version, engine), or the hello went wrong
    │   ├── NoServer      nobody listens there: the socket does not exist, or it or the port refuses
    │   └── Unreachable   whether anybody does cannot be told: rights, an unknown host, a socket of another container
    ├── ServerLost        the session ended, or is marked lost until a ping is answered
    ├── BoundExceeded     a call passed its bound, which marks the session lost
    ├── Busy              no room for one more request now; nothing was asked and nothing is lost: ask again later
    ├── ProtocolError     the other side sent what the protocol does not allow
    ├── NamespaceError    spec, digest or part layout refused; slot larger than a chunk; namespace table full
    ├── LeaseError        unknown or ended lease, another's part, another life of the server
    ├── SegmentError      the server's memory cannot be mapped, or is not what it says
    ├── DeviceError       a GPU or its driver is missing or refused
    ├── InvalidInput      also a ValueError: a bad argument (shape, dtype, range), named
    └── ConfigError       also a ValueError: a setting unknown or wrong, named with its source and what is allowed
"""

from ._kvmp import (
    BoundExceeded,
    Busy,
    ConnectError,
    DeviceError,
    InvalidInput,
    KvmpError,
    LeaseError,
    NamespaceError,
    NoServer,
    ProtocolError,
    SegmentError,
    ServerLost,
    Unreachable,
)

__all__ = [
    "BoundExceeded",
    "Busy",
    "ConfigError",
    "ConnectError",
    "DeviceError",
    "InvalidInput",
    "KvmpError",
    "LeaseError",
    "NamespaceError",
    "NoServer",
    "ProtocolError",
    "SegmentError",
    "ServerLost",
    "Unreachable",
]


class ConfigError(KvmpError, ValueError):
    """A setting is unknown or wrong; the text names its source, what was given and what is allowed."""
