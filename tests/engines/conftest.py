"""Real vLLM engines on the CPU, each in processes of its own; skipped where vLLM is not installed."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from demo.engine import ROOT, Engine
from demo.engine_config import EngineConfig, on_core
from demo.model import ensure_model
from tests.engines.harness import Reference

_HERE = Path(__file__).parent
_TEST_S = 600

StartEngine = Callable[..., Engine]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    installed = importlib.util.find_spec("vllm") is not None
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(_TEST_S))
            if not installed:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def model() -> str:
    return str(ensure_model(ROOT / ".demo" / "model"))


@pytest.fixture(scope="session")
def reference(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    engine = Reference(model, tmp_path_factory.mktemp("reference") / "engine.log")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def start_engine(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartEngine]:
    """Starts an engine and returns before it is up, so that several can start side by side; killed after the module."""
    folder, count = tmp_path_factory.mktemp("engines"), 0
    with ExitStack() as engines:

        def start(*, env: dict[str, str] | None = None, **config: Any) -> Engine:
            nonlocal count
            config["env"] = env or {}
            if config.get("tensor_parallel", 1) == 1:
                config["env"] = on_core(count) | config["env"]
            else:
                # Two engines of two ranks have four workers that spin, on two cores: one run beside other load
                # found nothing at the default bound. What is shown there is what is answered, not how fast.
                config["connector_config"] = {"kvmp.timeout_ms": 5000} | config.get("connector_config", {})
            count += 1
            return engines.enter_context(Engine(EngineConfig(model, **config), folder / f"engine-{count}.log"))

        yield start
