"""One setting: its name in every source, its kind, its default and its documentation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from kvmp.errors import ConfigError

from .kinds import FILE, Kind
from .near import did_you_mean, nearest

PREFIX = "kvmp."
VARIABLE_PREFIX = "KVMP_"


@dataclass(frozen=True)
class Setting:
    """What one field of a settings dataclass is.

    Attributes:
        name: the field's, and the key in a file's table ``[kvmp]``.
        kind: what its value may be; the default need not be of it.
        default: its value when no source gives one.
        doc: what it does, in Markdown.
    """

    name: str
    kind: Kind
    default: object
    doc: str

    @property
    def key(self) -> str:
        """Its key in ``kv_connector_extra_config``."""
        return PREFIX + self.name

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return VARIABLE_PREFIX + self.name.upper()

    def check(self, value: object, source: str) -> object:
        """The value, when it is of this setting's kind.

        Raises:
            ConfigError: it is not; the text names the source, the value and what is allowed.
        """
        if not self.kind.accepts(value):
            raise refused(source, value, self.kind.allowed, self.kind.spellings)
        return value

    def read_text(self, text: str, source: str) -> object:
        """The value that an environment variable's text stands for.

        Raises:
            ConfigError: as for ``check``.
        """
        value = self.kind.from_text(text)
        if not self.kind.accepts(value):
            raise refused(source, text, self.kind.allowed_as_text or self.kind.allowed, self.kind.spellings)
        return value


def refused(source: str, value: object, allowed: str, spellings: Collection[str] = ()) -> ConfigError:
    """The error for a value that is not allowed; ``spellings`` are the texts of which it may be a near miss."""
    meant = nearest(value.lower(), spellings) if isinstance(value, str) else ""
    hint = did_you_mean(meant) if meant else ""
    return ConfigError(f"{source}: {value!r} given, allowed is {allowed}{hint}")


def setting(default: object, kind: Kind, doc: str) -> Any:
    """A dataclass field that is a setting."""
    return field(default=default, metadata={"kind": kind, "doc": doc})


def settings_of(config: type[Any]) -> tuple[Setting, ...]:
    """The settings of a dataclass whose fields were made by ``setting``, in its order."""
    return tuple(Setting(f.name, f.metadata["kind"], f.default, f.metadata["doc"]) for f in fields(config))


CONFIG_FILE = Setting(
    "config_file",
    FILE,
    None,
    "TOML file whose table `[kvmp]` holds these keys without `kvmp.`, such as `timeout_ms = 50`",
)
