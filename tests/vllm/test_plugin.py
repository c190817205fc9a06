"""The plugin: names known to vLLM, once, lazily; silent but for one line where vLLM is not one of ours."""

import subprocess
import sys

import pytest
import vllm

from kvmp import factory
from kvmp.vllm import plugin


class Registry:
    """What the plugin uses of vLLM's KVConnectorFactory."""

    def __init__(self):
        self._registry = {plugin.LMCACHE: "LMCache's own"}

    def register_connector(self, name, module, class_name):
        if name in self._registry:
            raise ValueError(f"Connector '{name}' is already registered.")
        self._registry[name] = (module, class_name)


OURS = ("kvmp.vllm.connector", "KvmpConnector")


@pytest.fixture
def registry(monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector import factory

    fake = Registry()
    monkeypatch.setattr(factory, "KVConnectorFactory", fake)
    monkeypatch.delenv(plugin.REPLACE_LMCACHE, raising=False)
    return fake._registry


def test_registers_once_however_often_it_is_called(registry, caplog_vllm):
    plugin.register()
    plugin.register()
    assert registry == {plugin.LMCACHE: "LMCache's own", "KvmpConnector": OURS}
    assert not caplog_vllm.handler.records


def test_connectors_of_others_are_made_known_too(registry, monkeypatch):
    theirs = factory.Registered("Theirs", "their.module", "TheirClass", "their package")
    offers = factory.Registry([factory.registered("KvmpConnector")], lambda: [theirs])
    monkeypatch.setattr(plugin.factory, "names", offers.names)
    monkeypatch.setattr(plugin.factory, "registered", offers.registered)
    plugin.register()
    assert registry["Theirs"] == ("their.module", "TheirClass")
    assert registry["KvmpConnector"] == OURS


@pytest.mark.parametrize(("value", "replaced"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_answers_for_lmcache_when_asked(registry, monkeypatch, value, replaced):
    monkeypatch.setenv(plugin.REPLACE_LMCACHE, value)
    plugin.register()
    plugin.register()
    assert (registry[plugin.LMCACHE] == OURS) is replaced


def test_an_unclear_wish_is_said_and_changes_nothing(registry, monkeypatch, caplog_vllm):
    monkeypatch.setenv(plugin.REPLACE_LMCACHE, "maybe")
    plugin.register()
    assert registry[plugin.LMCACHE] == "LMCache's own"
    assert "maybe" in caplog_vllm.warnings()[0]


@pytest.mark.parametrize("other", ["0.28.0", "0.34.0"])
def test_another_vllm_gets_one_line_and_no_connector(registry, monkeypatch, caplog_vllm, other):
    monkeypatch.setattr(vllm, "__version__", other)
    monkeypatch.setattr(plugin.version, "_said", False)
    plugin.register()
    plugin.register()
    assert "KvmpConnector" not in registry
    (line,) = caplog_vllm.warnings()
    assert other in line
    assert "0.29 to 0.33" in line


def test_a_child_leaves_the_warning_to_its_parent(registry, monkeypatch, caplog_vllm):
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(plugin.version, "_said", False)
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: "there is one")
    plugin.register()
    assert not caplog_vllm.warnings()


def test_never_raises_and_says_why(registry, monkeypatch, caplog_vllm):
    monkeypatch.setattr(plugin.factory, "names", lambda: 1 / 0)
    plugin.register()
    (line,) = caplog_vllm.warnings()
    assert "could not be registered" in line


def test_imports_nothing_of_the_connector():
    code = (
        "import sys, kvmp.vllm.plugin as p\n"
        "from importlib.metadata import entry_points\n"
        "(found,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'kvmp']\n"
        "assert found.load() is p.register\n"
        "assert not {'vllm', 'torch', 'kvmp.vllm.connector'} & set(sys.modules)\n"
        "p.register()\n"
        "assert 'kvmp.vllm.connector' not in sys.modules\n"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory\n"
        "assert KVConnectorFactory.get_connector_class_by_name('KvmpConnector').__module__ == 'kvmp.vllm.connector'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
