"""From the offloading flags to a connector and its settings: one pure function."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from kvmp.errors import ConfigError

from .connector import check_extra_config
from .offloading import OffloadingConfig
from .setting import PREFIX, refused
from .size import size_text
from .transfer import KVTransferConfig

CONNECTOR = "KvmpConnector"
MODULE_PATH = "kvmp.vllm.connector"
_HIDDEN_STATES = "ExampleHiddenStatesConnector"
_WISH = PREFIX + "on_unreachable"
_SPAWN_SIZE = PREFIX + "spawn_size"


def translate(offloading: OffloadingConfig, transfer: KVTransferConfig | None = None) -> KVTransferConfig | None:
    """The transfer config that vLLM should run with.

    With no size, offloading is off: ``transfer`` itself, or ``None``. With one, the backend's connector replaces the
    one of ``transfer``, the role becomes ``kv_both``, and every other field and key of the extra config stays. For
    ``native`` and ``lmcache`` the result is what vLLM itself makes of the flags: a module path that was given for
    another connector stays too, and vLLM then refuses it. For ``kvmp`` the size goes to no one but a server that the
    connector itself starts: under ``kvmp.on_unreachable = "spawn"``, as ``kvmp.spawn_size`` unless that is given.

    Nothing but the arguments is read, and neither is changed.

    Raises:
        ConfigError: ``transfer`` has ``ExampleHiddenStatesConnector`` (alone or in ``MultiConnector``) while prefill is
            chunked, whether or not a size then replaces it; or, with a size, a ``kvmp.*`` key is unknown or wrong.
    """
    _check_types(offloading, transfer)
    if transfer is not None:
        _check_hidden_states(transfer, offloading.chunked_prefill)
    if offloading.size_gib is None:
        return transfer
    given = transfer or KVTransferConfig()
    _check_own_keys(given)
    return replace(given, kv_role="kv_both", **_FOR_BACKEND[offloading.backend](offloading, given))


def _native(offloading: OffloadingConfig, given: KVTransferConfig) -> dict[str, Any]:
    extra = {**given.kv_connector_extra_config, "cpu_bytes_to_use": offloading.size_bytes}
    connector = "SimpleCPUOffloadConnector" if offloading.simple else "OffloadingConnector"
    return {"kv_connector": connector, "kv_connector_extra_config": extra}


def _lmcache(_offloading: OffloadingConfig, _given: KVTransferConfig) -> dict[str, Any]:
    # LMCache's server owns the capacity, so the size only switches it on.
    return {"kv_connector": "LMCacheMPConnector"}


def _kvmp(offloading: OffloadingConfig, given: KVTransferConfig) -> dict[str, Any]:
    extra = dict(given.kv_connector_extra_config)
    if extra.get(_WISH) == "spawn":
        extra.setdefault(_SPAWN_SIZE, size_text(math.ceil(offloading.size_bytes)))
    check_extra_config(extra)
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE_PATH,
        "kv_connector_extra_config": extra,
    }


def _check_own_keys(given: KVTransferConfig) -> None:
    """Under every backend; a key of another connector is none of ours, however it is called."""
    extra = given.kv_connector_extra_config
    check_extra_config({key: value for key, value in extra.items() if isinstance(key, str) and key.startswith(PREFIX)})


_FOR_BACKEND = {"native": _native, "lmcache": _lmcache, "kvmp": _kvmp}


def _check_types(offloading: object, transfer: object) -> None:
    if not isinstance(offloading, OffloadingConfig):
        raise refused("offloading", offloading, "an OffloadingConfig")
    if transfer is not None and not isinstance(transfer, KVTransferConfig):
        raise refused("transfer", transfer, "a KVTransferConfig of kvmp.config (from_vllm makes one), or None")


def _check_hidden_states(transfer: KVTransferConfig, chunked_prefill: bool) -> None:
    if chunked_prefill and transfer.has_connector(_HIDDEN_STATES):
        raise ConfigError(
            f"kv_connector: {_HIDDEN_STATES} does not work with chunked prefill; "
            "switch that off with --no-enable-chunked-prefill"
        )
