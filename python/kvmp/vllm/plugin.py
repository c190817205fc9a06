"""vLLM's way to know `KvmpConnector` by name: the entry point `kvmp` of the group `vllm.general_plugins`.

vLLM calls `register` in every process it starts, before it looks at a configuration. Nothing of the connector is
imported here: vLLM's registry gets a module and a class name, and loads them when the connector is asked for.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from typing import Any

from kvmp import factory
from kvmp.config.translation import CONNECTOR
from kvmp.vllm import version

REPLACE_LMCACHE = "KVMP_REPLACE_LMCACHE"
LMCACHE = "LMCacheMPConnector"
_NAME = "kvmp"
_ALLOWED = "VLLM_PLUGINS"
_YES, _NO = ("1", "true"), ("", "0", "false")


def register() -> None:
    """Makes kvmp's connectors known to vLLM by name; never raises, for vLLM would not start."""
    logger = logging.getLogger("vllm.kvmp")
    try:
        if version.unsupported():
            reason = version.unsupported_once()  # nor does the connector say it again, where it is named by module path
            if reason and multiprocessing.parent_process() is None:  # its children would only repeat it
                logger.warning("%s; vLLM is not told the name %s", reason, CONNECTOR)
            return
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        _register_missing(KVConnectorFactory)
        if _wants_lmcache(logger):
            _replace_lmcache(KVConnectorFactory, logger)
    except Exception:
        logger.exception("kvmp: its connector could not be registered; name it by kv_connector_module_path")


def name_connector() -> None:
    """Makes `KvmpConnector` known by its name, also where it was named by its module.

    Under a MultiConnector vLLM's front end looks up whose counters it was given by the class's name alone.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        _register(KVConnectorFactory, CONNECTOR, CONNECTOR)


def hidden_by() -> str:
    """The list of plugins that vLLM was told to load and that leaves kvmp's out; empty when it is not left out."""
    allowed = os.environ.get(_ALLOWED)
    return "" if allowed is None or _NAME in allowed.split(",") else f"{_ALLOWED}={allowed}"


def _register_missing(registry: Any) -> None:
    for name in factory.names():
        if name not in registry._registry:  # vLLM's own names, and ours when we are called again
            _register(registry, name, name)


def _register(registry: Any, name: str, ours: str) -> None:
    where = factory.registered(ours)
    registry.register_connector(name, where.module, where.class_name)


def _wants_lmcache(logger: logging.Logger) -> bool:
    given = os.environ.get(REPLACE_LMCACHE, "").strip().lower()
    if given not in _YES + _NO:
        logger.warning("kvmp: %s=%s is neither 1 nor 0; LMCacheMPConnector stays what it was", REPLACE_LMCACHE, given)
    return given in _YES


def _replace_lmcache(registry: Any, logger: logging.Logger) -> None:
    registry._registry.pop(LMCACHE, None)
    _register(registry, LMCACHE, CONNECTOR)
    if multiprocessing.parent_process() is None:
        logger.info("kvmp answers for %s (%s)", LMCACHE, REPLACE_LMCACHE)
