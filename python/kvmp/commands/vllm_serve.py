"""``kvmp vllm serve MODEL``: finds or starts a server, then becomes ``vllm serve`` with the connector set.

asked -> server there (found | started) -> this process is vLLM
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from kvmp import background
from kvmp.client import Client
from kvmp.config import ConfigError, ConnectorConfig, KVTransferConfig
from kvmp.config.kinds import ENDPOINT, is_endpoint
from kvmp.config.near import did_you_mean, nearest
from kvmp.config.setting import refused
from kvmp.config.size import parse_size
from kvmp.config.transfer import release_of
from kvmp.config.translation import CONNECTOR, MODULE_PATH
from kvmp.default_size import default_size
from kvmp.endpoint import start_command
from kvmp.errors import ConnectError, KvmpError, NoServer, Unreachable
from kvmp.vllm import plugin, version

_TRANSFER_FLAG = "--kv-transfer-config"
_REPLACED_BY = ("--kv-offloading-size", "--kv-offloading-backend")
# What this command sets whatever was given: with others kvmp loads nothing, or a failed load fails its request.
_SET = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_module_path": MODULE_PATH}
_OURS = ("--kvmp-size", "--kvmp-endpoint")
_OWN_CONNECTOR = "puts vLLM's own connector in the place of kvmp's; say --kvmp-size SIZE instead"
_CONFIG_FLAG = "--config"
_CONFIG_KEY = re.compile(
    r"^[ \t]*[\"']?(kv[-_](?:offloading[-_](?:size|backend)|transfer[-_]config))[\"']?[ \t]*:", re.MULTILINE
)
_HELLO_MS = 2000

_DESCRIPTION = """Serve a model with vLLM, its KV cache kept by kvmp: uses the server that answers at the endpoint, or
starts one that drains and exits when this process ends, and leaves its segment for the next start. All other flags are
vLLM's own (`vllm serve --help`)."""


class _UsageError(Exception):
    """What was asked cannot be done as asked; the text says what to ask instead."""


def main(arguments: Sequence[str]) -> int:
    """Run ``kvmp vllm ARGUMENTS``; returns an exit code only when this process does not become vLLM."""
    try:
        return _main(arguments)
    except (_UsageError, ConfigError) as error:
        print(f"kvmp vllm serve: {error}", file=sys.stderr)
        return 2
    except KvmpError as error:
        print(f"kvmp vllm serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # a server that was started ends with this process
        return 130


def _main(arguments: Sequence[str]) -> int:
    command, flags = list(arguments[:1]), arguments[1:]
    if command != ["serve"]:
        if command not in (["-h"], ["--help"]):
            raise _UsageError(f"not a command: {shlex.join(['kvmp', 'vllm', *arguments])}; there is `serve` only")
        flags = arguments
    ours, vllm_flags = _parser().parse_known_args([_dashed(word) for word in flags])
    _check_flags(vllm_flags)
    _check_size(ours.kvmp_size)
    _check_endpoint(ours.kvmp_endpoint)
    transfer, vllm_flags = _take_transfer(vllm_flags)
    config = _settings(_extra(transfer, ours.kvmp_endpoint), ours.kvmp_size)
    serve = [*_vllm_serve(vllm_flags), _TRANSFER_FLAG, _transfer_json(transfer, config)]
    if ours.dry_run:
        return _print_commands(config, ours.kvmp_size, serve)
    _find_or_start(config, ours.kvmp_size)
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        return os.execvp(serve[0], serve)  # the server's --until-pid stays true: exec keeps the pid
    except OSError as error:
        raise KvmpError(f"cannot run {serve[0]}: {error.strerror}") from error


def _dashed(word: str) -> str:
    """A flag of ours with dashes, for vLLM takes its own with underscores too."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--kvmp") else word


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmp vllm serve",
        usage="kvmp vllm serve MODEL [--kvmp-size SIZE] [--kvmp-endpoint ENDPOINT] [--dry-run] [any flag of vLLM]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--kvmp-size",
        metavar="SIZE",
        help="memory of the server, such as 64GiB, where none answers yet "
        "(default: what the last one left, else a quarter of what is free of memory, its cgroup or /dev/shm)",
    )
    parser.add_argument(
        "--kvmp-endpoint",
        metavar="ENDPOINT",
        help="the server, unix:PATH or tcp://HOST:PORT (default: KVMP_ENDPOINT, else tcp://localhost:5555); "
        "without --kvmp-size none is started there",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands instead of running them")
    return parser


def _check_flags(vllm_flags: list[str]) -> None:
    """Refuses what is left where it can be none of vLLM's."""
    for word in vllm_flags:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--kvmp"):
            raise _UsageError(f"unknown flag {word}{did_you_mean(nearest(name, _OURS))} There are {', '.join(_OURS)}")
        if word == "--":
            raise _UsageError("-- ends the flags of vLLM, and kvmp has one to add: leave it out")


def _check_endpoint(endpoint: str | None) -> None:
    if endpoint is not None and not is_endpoint(endpoint):
        raise refused("--kvmp-endpoint", endpoint, ENDPOINT.allowed)


def _check_size(size: str | None) -> None:
    if size is None:
        return
    try:
        if parse_size(size) > 0:
            return
    except ValueError as error:
        raise _UsageError(f"--kvmp-size: {error}") from None
    raise _UsageError(f"--kvmp-size: {size!r} is no size of a server: give a number above zero and a unit, as in 64GiB")


# The connector's settings.


def _take_transfer(flags: list[str]) -> tuple[KVTransferConfig | None, list[str]]:
    """vLLM's flags without ``--kv-transfer-config``, and what that said."""
    rest, given, words = [], None, iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        name = _full_name(name.replace("_", "-"))
        if name in _REPLACED_BY:
            raise _UsageError(f"{name} {_OWN_CONNECTOR}")
        if name.split(".")[0] == _TRANSFER_FLAG and name != _TRANSFER_FLAG:
            raise _UsageError(f"{name}: give {_TRANSFER_FLAG} as one JSON object, so that kvmp can add to it")
        if name == _TRANSFER_FLAG:
            given = value if equals else next(words, "")
            continue
        rest.append(word)
        if name == _CONFIG_FLAG:
            file = value if equals else next(words, "")
            rest += [] if equals else [file]
            _check_config_file(file)
    return (None if given is None else _parsed_transfer(given)), rest


def _full_name(name: str) -> str:
    """What vLLM's parser would take a shortened flag for, where that is one that we look for."""
    if not name.startswith("--kv-"):
        return name
    return next((flag for flag in (*_REPLACED_BY, _TRANSFER_FLAG) if flag.startswith(name)), name)


def _check_config_file(file: str) -> None:
    """Refuses keys of vLLM's own YAML file that would put another connector in the place of kvmp's, or lose ours."""
    try:
        text = Path(file).read_text()
    except (OSError, ValueError):
        return  # vLLM says what is wrong with it
    for match in _CONFIG_KEY.finditer(text):
        name = f"--{match[1].replace('_', '-')}"
        if name == _TRANSFER_FLAG:
            raise _UsageError(f"{file}: {match[1]}: give {name} on the command line, so that kvmp can add to it")
        raise _UsageError(f"{file}: {match[1]} {_OWN_CONNECTOR}")


def _parsed_transfer(text: str) -> KVTransferConfig:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise _UsageError(f"{_TRANSFER_FLAG} is not JSON ({error}): {text!r}") from None
    if not isinstance(fields, dict):
        raise _UsageError(f"{_TRANSFER_FLAG} is not a JSON object: {text!r}")
    connector = fields.get("kv_connector", CONNECTOR)
    if connector != CONNECTOR:
        raise _UsageError(
            f"{_TRANSFER_FLAG} names {connector!r}, but this command sets kvmp's own connector; leave kv_connector "
            f"out, or call `vllm serve` itself with a MultiConnector that has both"
        )
    known = {field.name for field in dataclasses.fields(KVTransferConfig)}
    if unknown := sorted(set(fields) - known):
        raise _UsageError(f"{_TRANSFER_FLAG}: unknown field {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    given = KVTransferConfig(**fields)
    _say_what_is_replaced(fields)
    return given


def _say_what_is_replaced(fields: dict[str, Any]) -> None:
    for name, becomes in _SET.items():
        if (was := fields.get(name)) not in (None, becomes):
            print(f"kvmp: {name} {was!r} becomes {becomes!r}", file=sys.stderr)


def _extra(transfer: KVTransferConfig | None, endpoint: str | None) -> dict[str, Any]:
    extra = dict(transfer.kv_connector_extra_config) if transfer else {}
    if endpoint is not None:
        extra["kvmp.endpoint"] = endpoint
    return extra


def _settings(extra: dict[str, Any], size: str | None) -> ConnectorConfig:
    """What every source says; where none names the size of a server to spawn, it is that of ``--kvmp-size``."""
    named = ConnectorConfig.read({**extra, "kvmp.on_unreachable": "degrade"}).spawn_size
    return ConnectorConfig.read(extra if named or size is None else {**extra, "kvmp.spawn_size": size})


def _transfer_json(transfer: KVTransferConfig | None, config: ConnectorConfig) -> str:
    """What the engine gets: endpoint and spawn size are spelt out, whatever source they came from.

    vLLM knows the connector's name by the plugin; where that is hidden it gets the module too.
    """
    given = transfer or KVTransferConfig()
    extra = _extra(transfer, config.endpoint)
    if config.on_unreachable == "spawn":
        extra["kvmp.spawn_size"] = config.spawn_size
    made = dataclasses.replace(
        given,
        kv_connector=CONNECTOR,
        kv_connector_module_path=MODULE_PATH if plugin.hidden_by() else None,
        kv_connector_extra_config=extra,
        kv_role=_SET["kv_role"],
        kv_load_failure_policy=_SET["kv_load_failure_policy"],
    )
    return made.to_json(version.installed() or "0.33")


def _vllm_serve(flags: list[str]) -> list[str]:
    installed = version.installed()
    if installed is None:
        elsewhere = shutil.which("vllm")
        found = f" (the one at {elsewhere} belongs to another)" if elsewhere else ""
        raise _UsageError(f"there is no vLLM in kvmp's environment, {sys.prefix}{found}: install both into one")
    release = release_of(installed)
    if release is not None and not version.is_written_for(release):
        raise _UsageError(
            f"this is vLLM {installed}, and kvmp is written for vLLM {version.SPAN}: install one of those"
        )
    if version.of("vllm") is None:
        return _module_command(flags)
    program = Path(sys.executable).with_name("vllm")
    if not os.access(program, os.X_OK):
        raise _UsageError(f"{program} cannot be run: install vLLM into this environment again")
    return [str(program), "serve", *flags]


def _module_command(flags: list[str]) -> list[str]:
    """The CPU build's `vllm` looks for the metadata of a distribution called vllm and fails; its module starts."""
    if flags and flags[0].startswith("-") and not any(_names_model(word) for word in flags):
        raise _UsageError("the CPU build's server takes the model in the first place only: kvmp vllm serve MODEL FLAGS")
    model = ["--model", *flags[:1]] if flags and not flags[0].startswith("-") else flags[:1]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *model, *flags[1:]]


def _names_model(word: str) -> bool:
    return word.partition("=")[0] in ("--model", _CONFIG_FLAG, "-h", "--help")


# The server.


def _find_or_start(config: ConnectorConfig, size: str | None) -> None:
    if (found := _found(config)) is not None:
        kept = "; it keeps its own size" if size else ""
        print(f"kvmp: using the server at {found}{kept}", file=sys.stderr)
        return
    if (size := _size_to_start(config, size)) is None:
        print(f"kvmp: {_nobody_there(config)}", file=sys.stderr)
        return
    server = background.start(size, config.endpoint, until_pid=os.getpid(), socket_dir=config.socket_dir)
    who = f"started a server of {size} (pid {server.pid}) at" if server else "using the server at"
    print(f"kvmp: {who} {config.endpoint}", file=sys.stderr)


def _size_to_start(config: ConnectorConfig, size: str | None) -> str | None:
    """The size of the server to start; None where the endpoint is somebody's, who starts his own."""
    if size is None and config.on_unreachable == "spawn":
        size = config.spawn_size
    return size or (default_size(config.endpoint) if config.endpoint == ConnectorConfig().endpoint else None)


def _found(config: ConnectorConfig) -> str | None:
    try:
        client = Client.connect(config.endpoint, role="tool", socket_dir=config.socket_dir, timeout_ms=_HELLO_MS)
    except NoServer:
        return None
    except Unreachable:
        raise  # its own text has the mend
    except ConnectError as error:
        raise KvmpError(
            f"what answers at {config.endpoint} is no server for us: {error}. Stop it, or have a server of your own at "
            f"another place: --kvmp-endpoint unix:/PATH/NAME.sock --kvmp-size SIZE"
        ) from error
    with closing(client):
        return client.endpoint


def _nobody_there(config: ConnectorConfig) -> str:
    nobody = f"no server at {config.endpoint}"
    start = f"start one: {start_command(config.endpoint)}"
    if config.on_unreachable == "fail":
        raise KvmpError(f"{nobody}, and kvmp.on_unreachable is 'fail'; {start}")
    return f"{nobody}; vLLM starts without its cache and attaches when one comes; {start}"


def _print_commands(config: ConnectorConfig, size: str | None, command: list[str]) -> int:
    if (found := _found(config)) is not None:
        print(f"# a server answers at {found}")
    elif (size := _size_to_start(config, size)) is not None:
        print(f"{shlex.join(background.serve_command(size, config.endpoint, 0)[:-1])} $$ &")
    else:
        print(f"# {_nobody_there(config)}")
    print(f"exec {shlex.join(command)}")
    return 0
