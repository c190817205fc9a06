"""The connector's settings: default < file < environment < ``kv_connector_extra_config``, in one frozen dataclass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvmp.endpoint import DEFAULT_ENDPOINT
from kvmp.errors import ConfigError

from . import kinds
from .setting import CONFIG_FILE, Setting, refused, setting, settings_of
from .sources import Given, from_environment, from_extra_config, from_file


@dataclass(frozen=True)
class ConnectorConfig:
    """Settings of one connector. Each field is a ``kvmp.*`` key, a ``KVMP_*`` variable and a key of the file's table.

    Attributes:
        endpoint: where the server answers: ``unix:PATH`` or ``tcp://HOST:PORT``.
        socket_dir: folder in which this process finds the server's socket, when it is mounted elsewhere here.
        timeout_ms: what all calls of a step together may wait, and a request for its lookup, milliseconds.
        save_decode: whether blocks filled by generated tokens are stored too.
        on_unreachable: what to do at a start with no server: work without a cache, refuse, or start a server.
        spawn_size: size of the server that ``"spawn"`` starts, as for ``kvmp serve --size``; needed by it.
        verify: ``"always"`` stores every part with a sum and checks it after each load, ``"off"`` neither.

    Raises:
        ConfigError: a value that is not allowed, or ``"spawn"`` with no size.
    """

    endpoint: str = setting(DEFAULT_ENDPOINT, kinds.ENDPOINT, "the server: `unix:PATH` or `tcp://HOST:PORT`")
    socket_dir: str | None = setting(
        None,
        kinds.FOLDER,
        "folder in which the engine finds the server's socket, where a container mounts it elsewhere",
    )
    timeout_ms: int = setting(
        100, kinds.MILLISECONDS, "what all calls of a step together may wait; past it the answer is a miss"
    )
    save_decode: bool = setting(True, kinds.FLAG, "store the KV of generated tokens too")
    on_unreachable: Literal["degrade", "fail", "spawn"] = setting(
        "degrade",
        kinds.choice("degrade", "fail", "spawn"),
        "no server at the start: `degrade` works without a cache until one comes up, `fail` refuses to start, `spawn` "
        "starts one",
    )
    spawn_size: str | None = setting(
        None, kinds.SIZE, "size of the server that `spawn` starts, such as `64GiB`; needed by it"
    )
    verify: Literal["off", "always"] = setting(
        "off",
        kinds.choice("off", "always"),
        "`always`: store each block with a checksum and check it after every load; shared only with engines that do so",
    )

    def __post_init__(self) -> None:
        for each in connector_settings():
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                each.check(value, each.name)
        if self.on_unreachable == "spawn" and self.spawn_size is None:
            raise _no_spawn_size("on_unreachable")

    @classmethod
    def read(
        cls, extra_config: Mapping[str, object] | None, environ: Mapping[str, str] | None = None
    ) -> ConnectorConfig:
        """Reads the settings; a later source wins: default, file, environment, ``extra_config``.

        Args:
            extra_config: ``kv_connector_extra_config``; never changed. Its ``lmcache.mp.host`` and ``lmcache.mp.port``
                make the endpoint when it has no ``kvmp.endpoint``.
            environ: the environment; the process's own when not given.

        Raises:
            ConfigError: an unknown key or a value that is not allowed; the text names the source, what was given, what
                is allowed, and the nearest known spelling of an unknown key.
        """
        if extra_config is not None and not isinstance(extra_config, Mapping):
            raise refused("kv_connector_extra_config", extra_config, "a mapping")
        settings = connector_settings()
        environment = from_environment(settings, os.environ if environ is None else environ)
        given = environment | from_extra_config(settings, extra_config or {})
        if path := given.pop(CONFIG_FILE.name, None):
            given = from_file(settings, path) | given
        _check_spawn(given)
        return cls(**{name: each.value for name, each in given.items()})  # type: ignore[arg-type] # checked by kind

    @property
    def timeout_s(self) -> float:
        """``timeout_ms`` in seconds."""
        return self.timeout_ms / 1000


def connector_settings() -> tuple[Setting, ...]:
    """Every setting of a connector, in the order of the docs."""
    return settings_of(ConnectorConfig)


def check_extra_config(extra_config: Mapping[str, object]) -> None:
    """Checks the ``kvmp.*`` keys of an extra config alone, with no other source read.

    Raises:
        ConfigError: as for ``ConnectorConfig.read``.
    """
    from_extra_config(connector_settings(), extra_config)


def _check_spawn(given: Mapping[str, Given]) -> None:
    wish = given.get("on_unreachable")
    if wish and wish.value == "spawn" and "spawn_size" not in given:
        raise _no_spawn_size(wish.source)


def _no_spawn_size(source: str) -> ConfigError:
    return ConfigError(
        f"{source}: 'spawn' given without kvmp.spawn_size; set it (or KVMP_SPAWN_SIZE) to the size of the server to "
        "start, such as '8GiB'"
    )
