"""kvmp: an LLM node's KV cache in shared memory, owned by one small server and shared by every engine on the node.

Names are loaded when first used, so that the ``kvmp`` command reaches its Rust program before numpy is imported.
"""

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _sys.platform != "linux":
    raise ImportError(
        f"kvmp runs on Linux only, for it shares memory by tmpfs, memfd and OFD locks: this is {_sys.platform}"
    )

if _TYPE_CHECKING:
    from . import config, core, errors, factory, paged
    from .client import Answer, Client, ReadLease, WriteLease
    from .errors import KvmpError
    from .namespace import GroupSpec, NamespaceSpec, PartSpec
    from .paged import PagedKV
    from .server import Server, launch

    __version__: str

__all__ = [
    "Answer",
    "Client",
    "GroupSpec",
    "KvmpError",
    "NamespaceSpec",
    "PagedKV",
    "PartSpec",
    "ReadLease",
    "Server",
    "WriteLease",
    "__version__",
    "config",
    "core",
    "errors",
    "factory",
    "launch",
    "paged",
]

_HOME = {
    "Answer": "client",
    "Client": "client",
    "ReadLease": "client",
    "WriteLease": "client",
    "KvmpError": "errors",
    "GroupSpec": "namespace",
    "NamespaceSpec": "namespace",
    "PartSpec": "namespace",
    "PagedKV": "paged",
    "Server": "server",
    "launch": "server",
}
_MODULES = ("config", "core", "errors", "factory", "paged")


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = _import_module(f"{__name__}.{name}")
    elif name == "__version__":
        value = _import_module("importlib.metadata").version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
