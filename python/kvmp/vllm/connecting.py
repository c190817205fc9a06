"""How both sides reach a server when nothing stands in for it."""

from __future__ import annotations

from typing import Any


def client_connect(endpoint: str, **kwargs: Any) -> Any:
    """`kvmp.Client.connect`, imported when it is first needed."""
    from kvmp.client import Client

    return Client.connect(endpoint, **kwargs)
