"""The connector with copies that stop at a gate and requests that pass a trap: for tests of a server that goes."""

import os
from pathlib import Path
from typing import Any

from kvmp.vllm.lookups import Lookups
from kvmp.vllm.stores import Stores
from tests.engines.gate import FOLDER_VARIABLE
from tests.engines.held_copies import KvmpConnector
from tests.engines.trap import Trap

__all__ = ["KvmpConnector"]

_trap = Trap(Path(os.environ[FOLDER_VARIABLE]))
_hit_tokens, _submit, _reserve = Lookups.hit_tokens, Lookups._submit, Stores._reserve


def _trapped_submit(self: Lookups, state: Any) -> None:
    _trap.pass_over("lookup", state.namespace.session.client, lambda: _submit(self, state))


def _trapped_hit_tokens(self: Lookups, state: Any) -> int | None:
    if state.namespace is None:
        return _hit_tokens(self, state)
    return _trap.pass_over("wait", state.namespace.session.client, lambda: _hit_tokens(self, state))


def _trapped_reserve(self: Stores, state: Any, *blocks: Any) -> bool:
    return _trap.pass_over("reserve", state.namespace.session.client, lambda: _reserve(self, state, *blocks))


Lookups._submit, Lookups.hit_tokens, Stores._reserve = _trapped_submit, _trapped_hit_tokens, _trapped_reserve
