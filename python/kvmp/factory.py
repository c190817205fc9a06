"""Connectors by name. A registered name says where its class is; nothing is imported before the class is asked for.

Names come from kvmp itself, from ``register``, and from other packages' entry points of the group ``kvmp.connectors``::

    [project.entry-points."kvmp.connectors"]
    MyConnector = "my_package.connector:MyConnector"
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from kvmp.config.near import did_you_mean, nearest
from kvmp.config.translation import CONNECTOR, MODULE_PATH
from kvmp.errors import ConfigError

GROUP = "kvmp.connectors"
_CLASS = re.compile(r"\s*([\w.]+)\s*:\s*(\w+)\s*(\[.*\])?\s*")
# A child of vLLM's logger, so that its lines reach an engine's log; importing vllm for that is not needed.
_logger = logging.getLogger("vllm.kvmp")


@dataclass(frozen=True)
class Registered:
    """Where the class of a name is.

    Attributes:
        name: the connector's.
        module: module that holds the class.
        class_name: the class's name in it.
        owner: who registered it, in words.
    """

    name: str
    module: str
    class_name: str
    owner: str

    def load(self) -> type[Any]:
        """Imports the class.

        Raises:
            ConfigError: the module cannot be imported, or has no class of that name.
        """
        where = f"connector {self.name!r} of {self.owner}: {self.module}:{self.class_name}"
        try:
            loaded = getattr(importlib.import_module(self.module), self.class_name, None)
        except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
            raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        if not isinstance(loaded, type) or loaded.__name__ != self.class_name:
            raise ConfigError(f"{where} is no class of that name: {loaded!r} found")
        return loaded


_OWN = Registered(CONNECTOR, MODULE_PATH, CONNECTOR, "kvmp")


class Registry:
    """Names and where their classes are. Any thread may call any method.

    Args:
        own: what is there from the start.
        discover: finds what other packages offer; called once, when a name is first needed.
    """

    def __init__(self, own: Iterable[Registered], discover: Callable[[], Iterable[Registered]]) -> None:
        self._lock = threading.Lock()
        self._by_name = {each.name: each for each in own}
        self._discover: Callable[[], Iterable[Registered]] | None = discover

    def register(self, name: str, module: str, class_name: str) -> None:
        """Adds a name; see the function of the module."""
        given = {"name": name, "module": module, "class_name": class_name}
        for field, value in given.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{field}: {value!r} given, allowed is a text that is not empty")
        new = Registered(name, module, class_name, f"{module} (by kvmp.factory.register)")
        with self._lock:
            self._read_offers()
            if held := self._by_name.get(name):
                raise ConfigError(_taken(new, held))
            self._by_name[name] = new

    def names(self) -> tuple[str, ...]:
        """Every name, sorted."""
        with self._lock:
            self._read_offers()
            return tuple(sorted(self._by_name))

    def registered(self, name: str) -> Registered:
        """Where the class of a name is; see the function of the module."""
        with self._lock:
            self._read_offers()
            found = self._by_name.get(name) if isinstance(name, str) else None
        if found is None:
            raise ConfigError(_unknown(name, self.names()))
        return found

    def _read_offers(self) -> None:
        discover, self._discover = self._discover, None
        for offer in discover() if discover else ():
            held = self._by_name.setdefault(offer.name, offer)
            if held is not offer:
                # Not raised: a package that someone else installed must not stop the engine.
                _logger.warning("kvmp: %s", _taken(offer, held))


def _taken(new: Registered, held: Registered) -> str:
    return (
        f"connector name {new.name!r} is refused to {new.module}:{new.class_name} of {new.owner}: "
        f"{held.owner} has it for {held.module}:{held.class_name}"
    )


def _unknown(name: object, names: Iterable[str]) -> str:
    hint = did_you_mean(nearest(name, names)) if isinstance(name, str) else "."
    return f"no connector is called {name!r}{hint} There are: {', '.join(names)}"


def _offers() -> Iterator[Registered]:
    """What the entry points of installed packages offer; what is wrong with one of them is logged and skipped."""
    seen = set()
    for distribution in metadata.distributions():
        try:
            name, points = distribution.metadata["Name"], distribution.entry_points.select(group=GROUP)
        except Exception as error:  # broken metadata is that package's own affair
            _logger.debug("kvmp: the metadata of an installed package cannot be read: %s", error)
            continue
        # The same package twice on sys.path: Python imports the first.
        if points and name not in seen:
            seen.add(name)
            yield from filter(None, (_offer(point, name) for point in points))


def _offer(point: metadata.EntryPoint, distribution: str) -> Registered | None:
    match = _CLASS.fullmatch(point.value)
    if match is None:
        text = "kvmp: entry point %r of %s is refused: %r given, allowed is 'module:Class'"
        _logger.warning(text, point.name, distribution, point.value)
        return None
    return Registered(point.name, match[1], match[2], f"the package {distribution}")


_REGISTRY = Registry([_OWN], _offers)


def register(name: str, module: str, class_name: str) -> None:
    """Adds a connector. Nothing is imported.

    Raises:
        ConfigError: the name is taken; the text says by whom.
    """
    _REGISTRY.register(name, module, class_name)


def names() -> tuple[str, ...]:
    """The names of all connectors, sorted."""
    return _REGISTRY.names()


def registered(name: str) -> Registered:
    """Where the class of a connector is; nothing is imported.

    Raises:
        ConfigError: an unknown name, with all that there are.
    """
    return _REGISTRY.registered(name)


def connector_class(name: str) -> type[Any]:
    """Imports and gives the class of a connector.

    Raises:
        ConfigError: an unknown name, with all that there are; or a class that cannot be imported.
    """
    return registered(name).load()


def create(name: str, *args: Any, **kwargs: Any) -> Any:
    """Makes a connector, with the arguments of vLLM's constructor: ``vllm_config, role, kv_cache_config``.

    Raises:
        ConfigError: as for ``connector_class``; or the class is not one that vLLM can use as a connector.
    """
    loaded = connector_class(name)
    _check_is_connector(name, loaded)
    return loaded(*args, **kwargs)


def _check_is_connector(name: str, loaded: type[Any]) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    where = f"connector {name!r}: {loaded.__module__}.{loaded.__qualname__}"
    if not issubclass(loaded, KVConnectorBase_V1):
        raise ConfigError(f"{where} is no subclass of vLLM's KVConnectorBase_V1")
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise ConfigError(f"{where} is abstract: it lacks {missing}")
    if not _takes(loaded, "kv_cache_config"):
        raise ConfigError(f"{where} does not take kv_cache_config, vLLM's third argument")


def _takes(loaded: type[Any], name: str) -> bool:
    parameters = inspect.signature(loaded).parameters.values()
    named = any(each.name == name and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters)
    return named or any(each.kind is each.VAR_KEYWORD for each in parameters)
