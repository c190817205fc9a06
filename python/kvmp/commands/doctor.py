"""``kvmp doctor``: prints what the checks find; exit code 1 when one of them says FAIL."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing

from kvmp.config import ConfigError, ConnectorConfig
from kvmp.config.kinds import ENDPOINT, is_endpoint
from kvmp.config.setting import refused
from kvmp.doctor import machine, match, server, software
from kvmp.doctor.finding import Finding, Level, fail, ok, warn

_DESCRIPTION = """Look at this machine, at what is installed and at the server, and say line by line what is fine,
what is not, and the mend. With --model and any further flags of vLLM: also whether that engine would find what the
server holds. Nothing is changed."""


def main(arguments: Sequence[str]) -> int:
    """Run ``kvmp doctor ARGUMENTS``; 0 when nothing fails, 1 when something does."""
    ours, vllm_flags = _parser().parse_known_args(arguments)
    if vllm_flags and ours.model is None:
        _parser().error(f"unknown option {vllm_flags[0]}; flags of vLLM are taken with --model MODEL only")
    if ours.model is not None:
        vllm_flags = ["--model", ours.model, *vllm_flags]
    worst = 0
    try:
        for finding in _findings(ours.endpoint, vllm_flags):
            print(*finding.lines(), sep="\n", flush=True)
            worst = max(worst, finding.level is Level.FAIL)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(worst)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmp doctor",
        usage="kvmp doctor [--endpoint ENDPOINT] [--model MODEL [any flag of vLLM]]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--endpoint",
        metavar="ENDPOINT",
        help="the server, unix:PATH or tcp://HOST:PORT (default: KVMP_ENDPOINT, else tcp://localhost:5555)",
    )
    parser.add_argument("--model", metavar="MODEL", help="compare with the engine that vLLM would start for this model")
    return parser


def _settings(endpoint: str | None) -> ConnectorConfig | Finding:
    try:
        ConnectorConfig.read({})
    except ConfigError:  # said already, among what is set
        return warn("server", "not looked at, for the settings above are wrong")
    if endpoint is None:
        return ConnectorConfig.read({})
    if not is_endpoint(endpoint):
        return fail("server", str(refused("--endpoint", endpoint, ENDPOINT.allowed)), "give another --endpoint")
    return ConnectorConfig.read({"kvmp.endpoint": endpoint})


def _findings(endpoint: str | None, vllm_flags: Sequence[str]) -> Iterator[Finding]:
    yield from machine.check()
    yield from software.check()
    config = _settings(endpoint)
    if isinstance(config, Finding):
        yield config
        return
    yield machine.socket_folder(server.socket_folder(config.endpoint, config.socket_dir))
    client = server.connect(config.endpoint, config.socket_dir)
    if isinstance(client, Finding):
        yield client
        if vllm_flags:
            yield ok("namespace", "not compared: there is no server to compare with")
        return
    with closing(client):
        yield from server.check(client)
        if vllm_flags:
            yield from match.check(client, vllm_flags)
        else:
            yield ok("namespace", "not compared; add --model MODEL and the engine's flags")
