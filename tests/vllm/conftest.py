"""Tests of the vLLM connector; skipped by name where vLLM is not installed."""

import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def _vllm_is_installed() -> bool:
    # This very folder is called vllm, so finding a package of that name is not enough.
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


collect_ignore_glob = []
if _vllm_is_installed():
    with warnings.catch_warnings():
        # What torch and vLLM warn of while they are imported is theirs.
        warnings.simplefilter("ignore")
        import vllm.v1.attention.backends.cpu_attn  # noqa: F401

        import kvmp.vllm.connector  # noqa: F401
else:
    collect_ignore_glob.append("test_*.py")


def pytest_report_header(config):
    return None if _vllm_is_installed() else "tests/vllm: skipped, vLLM is not installed"


class Caught:
    """vLLM's logger does not propagate, so its lines are caught at the logger itself."""

    def __init__(self, handler):
        self.handler = handler

    def warnings(self):
        return [r.getMessage() for r in self.handler.records if r.levelno >= 30 and "kvmp" in r.getMessage()]

    def clear(self):
        self.handler.records.clear()


@pytest.fixture
def caplog_vllm():
    class Handler(logging.Handler):
        def __init__(self):
            super().__init__()
            self.records = []

        def emit(self, record):
            self.records.append(record)

    handler, logger = Handler(), logging.getLogger("vllm.kvmp")
    logger.addHandler(handler)
    yield Caught(handler)
    logger.removeHandler(handler)


@pytest.fixture
def server():
    import fakes

    return fakes.FakeServer()


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    """Builds engines on the fake server, and closes them."""
    from engine import Engine

    engines = []

    def build(**kwargs):
        engines.append(Engine(server, tmp_path, monkeypatch, **kwargs))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def gpu():
    """A fake device, and that no copy was let go while it was under way."""
    from fake_device import FakeDevice

    device = FakeDevice()
    yield device
    assert not device.dropped


@pytest.fixture
def flying(gpu, make, server):
    """An engine on the fake device with its prompt stored once; in the end all copies end."""
    from flying import Flying

    engine = Flying(gpu, make(paged=gpu.paged, num_blocks=400), server)
    engine.keep()
    yield engine
    gpu.end_all()
