"""What is installed: kvmp, vLLM, torch, and whether vLLM will find the connector."""

import importlib.metadata
import platform
from collections.abc import Iterator

from kvmp.config import ConfigError, ConnectorConfig
from kvmp.config.transfer import release_of
from kvmp.config.translation import CONNECTOR
from kvmp.vllm import plugin as vllm_plugin
from kvmp.vllm import version

from .finding import Finding, Level, fail, ok, warn

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
    mend = f"install vLLM {version.SPAN} here, or kvmp where such a vLLM is"
    if found is None:
        return warn("vLLM", "not installed in this environment", mend)
    release = release_of(found)
    if release is None:
        return warn("vLLM", f"{found}, which is no version that can be told; kvmp is written for {version.SPAN}")
    if not version.is_written_for(release):
        return fail("vLLM", f"{found}; kvmp is written for {version.SPAN}", mend)
    return ok("vLLM", found)


def torch() -> Finding:
    found = version.of("torch")
    return ok("torch", found) if found else warn("torch", "not installed; the server and the client do without it")


def plugin() -> Finding:
    what = "vLLM plugin"
    names = [point.name for point in importlib.metadata.entry_points(group=_PLUGIN_GROUP)]
    if _PLUGIN not in names:
        return fail(
            what, "not among this environment's entry points", "install kvmp's wheel into this environment again"
        )
    if hidden := vllm_plugin.hidden_by():
        mend = (
            f"{hidden}{'' if hidden.endswith('=') else ','}{_PLUGIN}, or name the module too (as kvmp vllm serve does)"
        )
        return warn(what, f"hidden by {hidden}: vLLM does not know {CONNECTOR} by name", mend)
    if vllm().level is not Level.OK:
        return ok(what, f"there; it tells a vLLM {version.SPAN} the name {CONNECTOR}")
    return ok(what, f"vLLM knows {CONNECTOR} by name")


def settings() -> Finding:
    try:
        config = ConnectorConfig.read({})
    except ConfigError as error:
        return fail("settings", str(error), "correct or unset it")
    return ok("settings", f"endpoint {config.endpoint}, when it is not there: {config.on_unreachable}")
