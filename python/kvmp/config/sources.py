"""Where settings come from: ``kv_connector_extra_config``, the environment, a TOML file. Each reader only reads."""

from __future__ import annotations

import errno
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvmp.errors import ConfigError

from . import lmcache
from .near import did_you_mean, nearest
from .setting import CONFIG_FILE, Setting
from .spelling import meant_key, meant_variable

_FILE_BYTES = 1 << 20
# Variables that others of kvmp read.
OTHER_VARIABLES = ("KVMP_LOG", "KVMP_REPLACE_LMCACHE")


@dataclass(frozen=True)
class Given:
    """A value and where it was given, as errors name it."""

    value: object
    source: str


def from_extra_config(settings: Iterable[Setting], extra_config: Mapping[str, object]) -> dict[str, Given]:
    """What ``kv_connector_extra_config`` sets, by the setting's name. Keys that are not kvmp's are left alone.

    Raises:
        ConfigError: an unknown ``kvmp.*`` key, a key plainly meant to be one, or a value that is not allowed.
    """
    known = {setting.key: setting for setting in (*settings, CONFIG_FILE)}
    given = {}
    for key, value in extra_config.items():
        if setting := known.get(key):
            source = f"kv_connector_extra_config[{key!r}]"
            given[setting.name] = Given(setting.check(value, source), source)
        elif (meant := meant_key(key, known)) is not None:
            raise _unknown("kv_connector_extra_config", key, meant, known)
    if "endpoint" not in given and (place := lmcache.endpoint(extra_config)):
        given["endpoint"] = Given(place, f"kv_connector_extra_config[{lmcache.HOST!r}, {lmcache.PORT!r}]")
    return given


def from_environment(settings: Iterable[Setting], environ: Mapping[str, str]) -> dict[str, Given]:
    """What ``KVMP_*`` variables set, by the setting's name; an empty variable counts as unset.

    Only near misses of known names are refused: Kubernetes itself sets ``KVMP_SERVICE_HOST``, ``KVMP_PORT`` and the
    like for a service called kvmp.

    Raises:
        ConfigError: a variable's text stands for no allowed value, or its name is a near miss.
    """
    known = {setting.variable: setting for setting in (*settings, CONFIG_FILE)}
    names = (*known, *OTHER_VARIABLES)
    given = {}
    for variable, text in environ.items():
        if variable in known and text:
            setting = known[variable]
            given[setting.name] = Given(setting.read_text(text, variable), variable)
        elif meant := meant_variable(variable, names):
            raise _unknown("environment", variable, meant, names)
    return given


def from_file(settings: Iterable[Setting], path: Given) -> dict[str, Given]:
    """What the table ``[kvmp]`` of a TOML file sets, by the setting's name.

    Raises:
        ConfigError: the file cannot be read, is no TOML or has no such table; an unknown key, or a value that is not
            allowed.
    """
    known = {setting.name: setting for setting in settings}
    given = {}
    for key, value in _table(path).items():
        if key not in known:
            raise _unknown(f"{path.value}: [kvmp]", key, nearest(key, known), known)
        source = f"{path.value}: [kvmp] {key}"
        given[key] = Given(known[key].check(value, source), source)
    return given


def _table(path: Given) -> dict[str, object]:
    try:
        content = tomllib.loads(_read(str(path.value)).decode())
    except OSError as error:
        raise ConfigError(f"{path.source}: {path.value!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{path.source}: {path.value!r} is no TOML: {error}") from error
    table = content.get("kvmp")
    if not isinstance(table, dict):
        raise ConfigError(f"{path.source}: {path.value!r} has no table [kvmp]; put the settings under that heading")
    return table


def _read(path: str) -> bytes:
    """The bytes of a regular file of settings: a pipe would be waited for, a device has no end."""
    # Without waiting for who writes into a pipe.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if found.st_size > _FILE_BYTES:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, of at most {_FILE_BYTES}")
        return file.read(_FILE_BYTES)


def _unknown(where: str, name: str, meant: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"{where}: unknown name {name!r}{did_you_mean(meant)} Allowed: {', '.join(sorted(known))}")
