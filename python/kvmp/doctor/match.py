"""Whether an engine would find what the server holds: its facts beside those of each open namespace."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn

from kvmp.client import Client
from kvmp.config import ConfigError, ConnectorConfig

from .finding import Finding, fail, ok, warn

_WHAT = "namespace"
# Known only when the engine runs: each worker's layout. The server compares it when the engine attaches.
_NOT_COMPARED = ("workers",)


def check(client: Client, flags: Sequence[str]) -> Iterator[Finding]:
    """Compares the engine that ``vllm serve FLAGS`` would be with the namespaces that the server knows."""
    ignored: list[str] = []
    try:
        model, facts = engine(flags, ignored)
    except ImportError as error:
        yield fail(_WHAT, f"not compared: vLLM cannot be imported ({error})", "install vLLM into this environment")
        return
    except ConfigError as error:
        yield fail(_WHAT, str(error), "correct it: the engine would not start either")
        return
    except Exception as error:  # whatever vLLM refuses the flags for
        yield fail(_WHAT, f"vLLM does not take {' '.join(flags)}: {error}", "call it with flags that vLLM starts with")
        return
    if ignored:
        yield ok("flags", f"not the engine's, so not looked at: {' '.join(ignored)}")
    yield compare(model, facts, [entry["spec"] for entry in client.namespaces()])


def engine(flags: Sequence[str], ignored: list[str]) -> tuple[str, dict[str, Any]]:
    """The model and the facts of the engine that vLLM makes of ``flags``; those of its API server go to ``ignored``."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvmp.vllm.spec import engine_facts

    logging.disable(logging.INFO)
    with redirect_stdout(io.StringIO()):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parser.error = _refuse
        parse_known = parser.parse_known_args

        def parse(*given: Any) -> tuple[Any, list[str]]:
            found, rest = parse_known(*given)
            ignored.extend(rest)
            return found, []

        parser.parse_known_args = parse
        parsed = parser.parse_args(list(flags))
        config = EngineArgs.from_cli_args(parsed).create_engine_config()
    transfer = config.kv_transfer_config
    settings = ConnectorConfig.read(transfer.kv_connector_extra_config if transfer else None)
    facts = engine_facts(config, config.cache_config.block_size, verify=settings.verify == "always")
    return config.model_config.model, facts


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def compare(model: str, facts: Mapping[str, Any], specs: Sequence[Mapping[str, Any]]) -> Finding:
    """The finding for an engine with these facts."""
    plain = [spec for spec in specs if not spec.get("salt") and "adapter_sha256" not in spec["facts"]]
    same_model = [spec for spec in plain if spec["model"] == model]
    if not same_model:
        return ok(_WHAT, f"the server holds nothing of {model} yet; the first engine will fill it")
    nearest = min((differences(spec["facts"], facts) for spec in same_model), key=len)
    if not nearest:
        return ok(_WHAT, f"this engine's configuration matches an open namespace of {model}")
    told = "; ".join(f"{path}: there {there!r}, here {here!r}" for path, there, here in nearest)
    return warn(_WHAT, f"no namespace of {model} matches: {told}", "start the engines with the same settings to share")


def differences(there: Any, here: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two trees of facts differ, with both values."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = sorted((set(there) | set(here)) - (set() if path else set(_NOT_COMPARED)))
        return [
            found
            for key in keys
            for found in differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if there == here else [(path, there, here)]
