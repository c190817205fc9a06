"""The connector with copies that stop at a gate: for tests of what happens while a copy is part done."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmp import paged
from kvmp.vllm.connector import KvmpConnector
from tests.engines.gate import FOLDER_VARIABLE, Gate

__all__ = ["KvmpConnector"]

_gate = Gate(Path(os.environ[FOLDER_VARIABLE]))


def _gated(copy: Callable[..., Any], verb: str) -> Callable[..., Any]:
    def gated(*args: Any, **options: Any) -> Any:
        result = copy(*args, **options)
        _gate.pass_through(verb)
        return result

    return gated


paged.PagedKV.begin_load = _gated(paged.PagedKV.begin_load, "load")
paged.PagedKV.begin_store = _gated(paged.PagedKV.begin_store, "store")
