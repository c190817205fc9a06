"""``KVTransferConfig`` with the fields of every supported vLLM, and its way to and from each version's own."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from kvmp.errors import ConfigError

from .setting import refused

# Fields that vLLM 0.32 no longer has, with what 0.29 to 0.31 take when they are not given.
_OLD_DEFAULTS = {"kv_buffer_size": 1e9, "kv_rank": None, "kv_parallel_size": 1, "kv_ip": "127.0.0.1"}
_FIRST_WITHOUT_OLD = (0, 32)
_ROLES = ("kv_producer", "kv_consumer", "kv_both")
_POLICIES = ("recompute", "fail")


def _one(default: Any, *types: type, allowed: str = "", among: Collection[object] = ()) -> Any:
    """A field of one value; ``None`` is allowed where it is the default, ``bool`` only where it is named."""
    named = allowed or " or ".join(map(repr, among)) or " or ".join(each.__name__ for each in types)
    return field(default=default, metadata={"types": types, "among": among, "allowed": named})


@dataclass(frozen=True)
class KVTransferConfig:
    """vLLM's ``--kv-transfer-config``, in vLLM's names. ``None`` means "not given": vLLM's own default holds.

    Attributes:
        kv_connector: name of the connector.
        engine_id: the engine's id; vLLM makes one up for each start when not given.
        kv_buffer_device: device of the connector's buffer; the platform's when not given.
        kv_role: ``"kv_producer"``, ``"kv_consumer"`` or ``"kv_both"``; vLLM needs one with a connector.
        kv_port: the connector's port.
        kv_connector_extra_config: the connector's own settings; a copy of what was given, that nobody else holds.
        kv_connector_module_path: module in which ``kv_connector`` is a class; vLLM's registry when not given.
        enable_permute_local_kv: vLLM's experiment with permuted KV.
        kv_load_failure_policy: ``"fail"`` errors a request whose load failed, ``"recompute"`` computes it.
        kv_buffer_size: bytes; vLLM 0.29 to 0.31 only.
        kv_rank: vLLM 0.29 to 0.31 only.
        kv_parallel_size: vLLM 0.29 to 0.31 only.
        kv_ip: vLLM 0.29 to 0.31 only.

    Raises:
        ConfigError: a value of a wrong type, or not among those allowed.
    """

    kv_connector: str | None = _one(None, str, allowed="the name of a connector")
    engine_id: str | None = _one(None, str)
    kv_buffer_device: str | None = _one(None, str, allowed="the name of a device, such as 'cpu'")
    kv_role: str | None = _one(None, str, among=_ROLES)
    kv_port: int = _one(14579, int, allowed="a port")
    kv_connector_extra_config: Mapping[str, Any] = field(default_factory=dict)
    kv_connector_module_path: str | None = _one(None, str, allowed="the name of a module")
    enable_permute_local_kv: bool = _one(False, bool)
    kv_load_failure_policy: str = _one("fail", str, among=_POLICIES)
    kv_buffer_size: float | None = _one(None, int, float, allowed="a number of bytes")
    kv_rank: int | None = _one(None, int)
    kv_parallel_size: int | None = _one(None, int)
    kv_ip: str | None = _one(None, str)

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata:
                _check(each, getattr(self, each.name))
        extra = self.kv_connector_extra_config
        if not isinstance(extra, Mapping):
            raise refused("kv_connector_extra_config", extra, "a mapping")
        object.__setattr__(self, "kv_connector_extra_config", _copied(extra))

    def has_connector(self, name: str) -> bool:
        """Whether this connector is used, by itself or as a child of ``MultiConnector``, at any depth."""
        return _uses(self.kv_connector, self.kv_connector_extra_config, name)

    def as_dict(self, version: str) -> dict[str, Any]:
        """The fields that a vLLM of this version must be given: those that differ from its defaults.

        Args:
            version: of vLLM, such as ``"0.32.0"`` or ``"0.32.0+cpu"``.

        Raises:
            ConfigError: a field is set that this version does not have, or the version is none.
        """
        has_old = _checked_release(version) < _FIRST_WITHOUT_OLD
        known = {each.name for each in fields(self)} - (set() if has_old else _OLD_DEFAULTS.keys())
        return self._for(known, version)

    def to_json(self, version: str) -> str:
        """``as_dict`` as JSON, for the command line's ``--kv-transfer-config``.

        Raises:
            ConfigError: as for ``as_dict``; or the extra config holds what JSON cannot.
        """
        try:
            return json.dumps(self.as_dict(version))
        except TypeError as error:
            raise ConfigError(f"kv_connector_extra_config: cannot be written as JSON: {error}") from error

    def to_vllm(self) -> Any:
        """An object of the installed vLLM's class.

        Raises:
            ImportError: no vLLM is installed.
            ConfigError: a field is set that the installed version does not have.
            ValueError: vLLM refuses it, such as a connector with no role.
        """
        import vllm
        from vllm.config import KVTransferConfig as Theirs

        return Theirs(**self._for({each.name for each in fields(Theirs)}, vllm.__version__))

    @classmethod
    def from_vllm(cls, theirs: Any) -> KVTransferConfig:
        """Ours of an object of any supported vLLM's class, which is left as it is.

        Old fields at vLLM's default count as not given, so that the result serves newer versions too.

        Raises:
            ConfigError: it is no such object.
        """
        given = {each.name: getattr(theirs, each.name) for each in fields(cls) if hasattr(theirs, each.name)}
        if not given:
            raise refused("theirs", theirs, "a KVTransferConfig of vLLM's")
        return cls(**{name: value for name, value in given.items() if not _is_old_default(name, value)})

    def _for(self, known: Collection[str], version: str) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        given = {each.name: values[each.name] for each in fields(self) if values[each.name] != _default(each)}
        if unknown := sorted(given.keys() - set(known)):
            raise ConfigError(f"{', '.join(unknown)}: set, but vLLM {version} has no such field; leave it out")
        return {name: _copied(value) for name, value in given.items()}


def _uses(connector: object, extra: object, name: str) -> bool:
    if connector != "MultiConnector":
        return connector == name
    children = extra.get("connectors") if isinstance(extra, Mapping) else None
    return isinstance(children, (list, tuple)) and any(
        _uses(child.get("kv_connector"), child.get("kv_connector_extra_config"), name)
        for child in map(_fields_of, children)
    )


def _fields_of(child: object) -> Mapping[str, Any]:
    """A child of ``MultiConnector``: a mapping, or one of our own objects."""
    if isinstance(child, KVTransferConfig):
        return {each.name: getattr(child, each.name) for each in fields(child)}
    return child if isinstance(child, Mapping) else {}


def _default(each: Field[Any]) -> object:
    return each.default if each.default is not MISSING else {}


def _is_old_default(name: str, value: object) -> bool:
    return name in _OLD_DEFAULTS and value == _OLD_DEFAULTS[name]


def _check(each: Field[Any], value: object) -> None:
    types, among = each.metadata["types"], each.metadata["among"]
    if value is None and each.default is None:
        return
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not fits or (among and value not in among):
        raise refused(each.name, value, each.metadata["allowed"], among)


def _copied(value: Any) -> Any:
    """A copy down to what is neither mapping, list nor tuple; a connector's settings may hold anything there."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def release_of(version: str) -> tuple[int, int] | None:
    """(major, minor) of a version as vLLM writes it, ``None`` for what is none."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _checked_release(version: str) -> tuple[int, int]:
    release = release_of(version) if isinstance(version, str) else None
    if release is None:
        raise refused("version", version, "a version of vLLM, such as '0.32.0'")
    return release
