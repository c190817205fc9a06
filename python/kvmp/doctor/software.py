"""What is installed: kvmp, vLLM, torch, and whether vLLM will find the connector."""

import importlib.metadata
import platform
from collections.abc import Iterator

from kvmp.config import ConfigError, ConnectorConfig
from kvmp.vllm import plugin as vllm_plugin
from kvmp.vllm import version

from .finding import Finding, fail, ok, warn

_PLUGIN_GROUP, _PLUGIN = "vllm.general_plugins", "kvmp"


def check() -> Iterator[Finding]:
    """Every check of what is installed and set."""
    yield ok("kvmp", f"{importlib.metadata.version('kvmp')}, Python {platform.python_version()}, {platform.release()}")
    yield vllm()
    yield torch()
    yield plugin()
    yield settings()


def vllm() -> Finding:
    found = version.installed()
    (_, oldest), (_, newest) = version.WRITTEN_FOR
    span = f"0.{oldest} to 0.{newest}"
    if found is None:
        return warn("vLLM", "not installed in this environment", f"install vLLM {span} here, or kvmp where vLLM is")
    number = version.number_of(found)
    if number is None:
        return warn("vLLM", f"{found}, which is no version that can be told; kvmp is written for {span}")
    if not (0, oldest) <= number <= (0, newest):
        mend = f'pip install "vllm>=0.{oldest},<0.{newest + 1}"'
        return fail("vLLM", f"{found}; kvmp is written for {span}", mend)
    return ok("vLLM", found)


def torch() -> Finding:
    found = _version("torch")
    return ok("torch", found) if found else warn("torch", "not installed; the server and the client do without it")


def plugin() -> Finding:
    what = "vLLM plugin"
    names = [point.name for point in importlib.metadata.entry_points(group=_PLUGIN_GROUP)]
    if _PLUGIN not in names:
        return fail(what, "not among this environment's entry points", "pip install --force-reinstall kvmp")
    if hidden := vllm_plugin.hidden_by():
        mend = f"{hidden}{'' if hidden.endswith('=') else ','}{_PLUGIN}"
        return fail(what, f"hidden by {hidden}", mend)
    return ok(what, "vLLM knows KvmpConnector by name")


def settings() -> Finding:
    try:
        config = ConnectorConfig.read({})
    except ConfigError as error:
        return fail("settings", str(error), "correct or unset it")
    return ok("settings", f"endpoint {config.endpoint}, when it is not there: {config.on_unreachable}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
