"""Every way into the connector that any vLLM of the window has, found by reflection, and how to go it.

What the installed base class has is reflected; what other releases have is in `tests/vllm/hooks`, also 0.33's, which
has no build for CPUs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import fakes
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from kvmp.vllm import compat
from kvmp.vllm.connector import KvmpConnector
from tests.vllm.hooks import facts

TABLE = [1, 2, 3, 4, 5]

BASES = {"KVConnectorBase_V1": KVConnectorBase_V1, "SupportsHMA": SupportsHMA}


def is_entry(name: str) -> bool:
    """Public, or one of the values that vLLM reads under a private name."""
    return not name.startswith("_") or name == "_cache_hit_source"


def of_releases() -> dict[str, set[tuple[str, ...]]]:
    """Name -> the parameter lists that it has in some release; none for what is only read."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for version in facts.stored_versions():
        classes = facts.load(version)["classes"]
        for name, hook in (item for base in BASES for item in classes[base].items()):
            if is_entry(name):
                lists = found.setdefault(name, set())
                lists |= {tuple(hook["parameters"])} if "parameters" in hook else set()
    return found


def of_the_installed() -> dict[str, set[tuple[str, ...]]]:
    """The same of the base classes that are installed, by reflection: methods, class methods, properties and values."""
    found = {}
    for base in BASES.values():
        for name in filter(is_entry, dir(base)):
            member = inspect.getattr_static(base, name)
            called = inspect.isfunction(member) or isinstance(member, classmethod | staticmethod)
            found[name] = {tuple(_parameters(base, name, member))} if called else set()
    return found


def _parameters(owner: type, name: str, member: Any) -> Iterator[str]:
    given = list(inspect.signature(getattr(owner, name)).parameters.values())
    for p in given[1:] if inspect.isfunction(member) else given:
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        yield stars + p.name + ("" if p.default is p.empty else "=")


# Without the class that this answers with (before 0.30) vLLM does not ask, and the answer could not be made.
ANSWERED_IN_ANOTHER_WAY = {"get_transfer_results"} if compat.TransferResults is None else set()


def entry_points() -> dict[str, list[tuple[str, ...]]]:
    """Of all of them those that the connector answers to here, its own or the base's."""
    releases, installed = of_releases(), of_the_installed()
    names = sorted(set(releases) | set(installed))
    return {
        name: sorted(releases.get(name, set()) | installed.get(name, set()))
        for name in names
        if hasattr(KvmpConnector, name) and name not in ANSWERED_IN_ANOTHER_WAY
    }


def is_own(name: str) -> bool:
    """Whether kvmp's code runs, and not only the base's."""
    return name in vars(KvmpConnector)


ENTRIES = entry_points()
MISSING_HERE = (set(of_releases()) | set(of_the_installed())) - set(ENTRIES) - ANSWERED_IN_ANOTHER_WAY
"""Of another release than the one installed, and left to that release's base."""

# A value for each parameter that some entry point has.
ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "request": lambda engine: fakes.request("q", list(range(18))),
    "num_computed_tokens": lambda engine: 0,
    "num_external_tokens": lambda engine: 0,
    "blocks": lambda engine: fakes.blocks_of(TABLE),
    "block_ids": lambda engine: [1],
    "scheduler_output": lambda engine: fakes.step({"q": TABLE}, new=[("q", 0, 18)]),
    "connector_output": lambda engine: fakes.output(),
    "connector_metadata": lambda engine: engine.scheduler.build_connector_meta(fakes.step({})),
    "kv_connector_metadata": lambda engine: engine.scheduler.build_connector_meta(fakes.step({})),
    "finished_req_ids": lambda engine: set(),
    "forward_context": lambda engine: None,
    "layer_name": lambda engine: "layer.0",
    "kv_layer": lambda engine: None,
    "attn_metadata": lambda engine: None,
    "kv_caches": lambda engine: {},
    "copy_operation": lambda engine: None,
    "metadata": lambda engine: {},
    "gpu_block_pool": lambda engine: engine.pool,
    "kv_cache_manager": lambda engine: fakes.SimpleNamespace(block_pool=engine.pool),
    "partial_tail_offloads": lambda engine: [],
    "data": lambda engine: {"lookups": 1},
    "vllm_config": lambda engine: engine.config,
    "kv_transfer_config": lambda engine: engine.config.kv_transfer_config,
    "extra_config": lambda engine: {},
    "metric_types": lambda engine: {},
    "labelnames": lambda engine: [],
    "per_engine_labelvalues": lambda engine: {},
}


def calls(name: str) -> list[tuple[str, ...]]:
    """The parameters to give in a call, for each way some release may call it; () once for what takes none."""
    ways = {tuple(p.rstrip("=") for p in given if not p.startswith("*") and p != "/") for given in ENTRIES[name]}
    return sorted(ways) or [()]


def go(engine: Any, connector: Any, name: str, given: tuple[str, ...], bad: Any = None) -> Any:
    """What the entry point answers: read where it is a value or a property, called where it can be."""
    member = getattr(connector, name)
    if not ENTRIES[name]:
        return member
    return member(*[ARGUMENTS[p](engine) if bad is None else bad for p in given])


# What an answer must be whatever failed; of the others, anything.
SANE: dict[str, Callable[[Any], bool]] = {
    "get_num_new_matched_tokens": lambda result: result in ((0, False), (None, False), (16, True)),
    "request_finished": lambda result: result == (False, None),
    "build_connector_meta": lambda result: type(result).__name__ == "StepMeta",
    "get_finished": lambda result: result == (None, None),
    "get_transfer_results": lambda result: not (result.finished_sending or result.failed_recving),
    "get_block_ids_with_load_errors": lambda result: result == set(),
    "has_pending_push_work": lambda result: isinstance(result, bool),
    "has_pending_block_frees": lambda result: isinstance(result, bool),
    "reset_cache": lambda result: result is True,
    "take_events": lambda result: not list(result),
    "requires_kv_delivery": lambda result: result is False,
    "get_required_kvcache_layout": lambda result: result is None,
    "build_kv_connector_stats": lambda result: type(result).__name__ == "KvmpStats",
    "build_prom_metrics": lambda result: type(result).__name__ == "KvmpPromMetrics",
}


def check(name: str, result: Any) -> None:
    assert SANE.get(name, lambda result: True)(result), (name, result)


def go_everywhere(engine: Any) -> None:
    """Every entry point of every side, as every release calls it."""
    for connector in (engine.scheduler, *engine.workers):
        for name in ENTRIES:
            for given in calls(name):
                check(name, go(engine, connector, name, given))
