"""Connectors by name: lazy, refused by name, open to other packages."""

import logging
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest

from kvmp import factory
from kvmp.config import ConfigError
from kvmp.factory import Registered, Registry

MINE = Registered("Mine", "mine", "Mine", "kvmp")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def module(folder, monkeypatch, name, text):
    (folder / f"{name}.py").write_text(text)
    monkeypatch.delitem(sys.modules, name, raising=False)


def package(folder, name, *lines, group="kvmp.connectors"):
    """A package as it lies installed: its metadata alone."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")


@pytest.fixture
def warnings():
    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines, handler, logger = [], Kept(logging.WARNING), logging.getLogger("vllm.kvmp")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def fresh(discover=factory._offers):
    return Registry([MINE], discover)


def test_kvmps_own_is_there():
    assert "KvmpConnector" in factory.names()
    found = factory.registered("KvmpConnector")
    assert (found.module, found.class_name) == ("kvmp.vllm.connector", "KvmpConnector")
    with pytest.raises(ConfigError, match="did you mean 'KvmpConnector'"):
        factory.registered("KvmpConector")


def test_a_registered_class_is_imported_when_asked_for_and_not_before(folder, monkeypatch):
    module(folder, monkeypatch, "lazy_one", "class Lazy: pass")
    registry = fresh()
    registry.register("L", "lazy_one", "Lazy")
    assert registry.names() == ("L", "Mine")
    assert "lazy_one" not in sys.modules
    assert registry.registered("L").load() is sys.modules["lazy_one"].Lazy


@pytest.mark.parametrize(("name", "holder"), [("Mine", "kvmp has it for mine:Mine"), ("Taken", "first (by kvmp.f")])
def test_a_duplicate_is_an_error_that_says_who_has_the_name(name, holder):
    registry = fresh()
    registry.register("Taken", "first", "A")
    with pytest.raises(ConfigError) as caught:
        registry.register(name, "second", "B")
    assert all(text in str(caught.value) for text in (repr(name), "second:B", holder))


@pytest.mark.parametrize("given", [("", "m", "C"), ("N", "", "C"), ("N", "m", None)])
def test_what_is_no_name_is_refused(given):
    with pytest.raises(ConfigError, match="given, allowed is a text"):
        fresh().register(*given)


def test_an_unknown_name_lists_what_there_is_and_the_nearest():
    with pytest.raises(ConfigError, match="'Mime'; did you mean 'Mine'\\? There are: Mine"):
        fresh(list).registered("Mime")
    with pytest.raises(ConfigError, match=r"None\. There are: Mine"):
        fresh(list).registered(None)


def test_another_package_offers_a_connector(folder, monkeypatch):
    package(folder, "theirs", "Theirs = theirs_module:Theirs", "Extra = theirs_module:Extra [fast]")
    package(folder, "unrelated", "Other = theirs_module:Other", group="other.group")
    registry = fresh()
    assert {"Theirs", "Extra"} <= set(registry.names())
    assert "Other" not in registry.names()
    assert "theirs_module" not in sys.modules
    module(folder, monkeypatch, "theirs_module", "class Theirs: pass")
    assert registry.registered("Theirs").load().__name__ == "Theirs"


def test_a_package_that_takes_kvmps_name_is_refused_in_the_log_only(folder, warnings):
    package(folder, "greedy", "Mine = greedy_module:Mine", "Good = greedy_module:Good")
    registry = fresh()
    assert {"Mine", "Good"} <= set(registry.names())
    assert registry._by_name["Mine"] is MINE
    assert len(warnings) == 1
    assert "'Mine' is refused to greedy_module:Mine of the package greedy: kvmp has it" in warnings[0]
    registry.names()
    assert len(warnings) == 1  # read once


def test_two_packages_of_one_name_are_both_named(folder, warnings):
    package(folder, "one", "Both = one_module:Both")
    package(folder, "two", "Both = two_module:Both")
    fresh().names()
    assert len(warnings) == 1
    assert "package one" in warnings[0]
    assert "package two" in warnings[0]


def test_a_name_that_a_package_offers_cannot_be_registered(folder):
    package(folder, "theirs", "Theirs = theirs_module:Theirs")
    with pytest.raises(ConfigError, match="the package theirs has it"):
        fresh().register("Theirs", "m", "C")


@pytest.mark.parametrize("value", ["no_class", "a b:C", "m:C.D", ":C"])
def test_a_malformed_entry_point_is_refused_in_the_log_only(folder, warnings, value):
    package(folder, "bad", f"Bad = {value}", "Good = good_module:Good")
    names = fresh().names()
    assert "Good" in names
    assert "Bad" not in names
    assert len(warnings) == 1
    assert "'Bad' of bad" in warnings[0]
    assert value in warnings[0]


def test_a_package_with_broken_metadata_hides_no_other(folder):
    package(folder, "good", "Good = good_module:Good")
    (folder / "broken-1.0.dist-info").mkdir()
    (folder / "broken-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    (folder / "broken-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[kvmp.connectors]\nno equals sign\n")
    assert "Good" in fresh().names()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot be imported", "ModuleNotFoundError"]),
        ("1 / 0", ["cannot be imported", "ZeroDivisionError"]),
        ("x = 1", ["no class of that name", "None found"]),
        ("Wrong = 5", ["no class of that name", "5 found"]),
        ("class Other: pass\nWrong = Other", ["no class of that name", "Other"]),
    ],
)
def test_what_is_not_what_it_says_is_refused_and_named(folder, monkeypatch, text, words):
    if text is not None:
        module(folder, monkeypatch, "wrong_module", text)
    registry = fresh()
    registry.register("W", "wrong_module", "Wrong")
    with pytest.raises(ConfigError) as caught:
        registry.registered("W").load()
    assert all(word in str(caught.value) for word in ["connector 'W'", "wrong_module:Wrong", *words]), caught.value


def test_a_module_may_register_while_it_is_imported(folder, monkeypatch):
    text = "from kvmp import factory\nREGISTRY = None\nclass Outer: pass\nimport builtins\nbuiltins._kvmp_hook()"
    module(folder, monkeypatch, "registers", text)
    registry = fresh()
    monkeypatch.setattr("builtins._kvmp_hook", lambda: registry.register("Inner", "m", "C"), raising=False)
    registry.register("Outer", "registers", "Outer")
    registry.registered("Outer").load()
    assert "Inner" in registry.names()


def test_threads_find_the_same_and_one_of_them_gets_the_name():
    reads, won, lost = [], [], []
    start = threading.Barrier(8)

    def discover():
        reads.append(1)
        return [Registered("Offered", "m", "C", "p")]

    registry = Registry([MINE], discover)

    def work():
        start.wait(timeout=30)
        try:
            registry.register("Wanted", "m", "C")
            won.append(registry.names())
        except ConfigError:
            lost.append(registry.names())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (len(reads), len(won), len(lost)) == (1, 1, 7)
    assert {*won, *lost} == {("Mine", "Offered", "Wanted")}


def test_listing_imports_neither_torch_numpy_nor_vllm():
    code = (
        "import sys, kvmp.factory\n"
        "kvmp.factory.register('X', 'nowhere', 'X')\n"
        "assert 'X' in kvmp.factory.names()\n"
        "print({'torch', 'numpy', 'vllm'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


_SPEC = find_spec("vllm")
CREATED = """
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

class Plain:
    pass

class Abstract(KVConnectorBase_V1):
    pass

class Old(KVConnectorBase_V1):
    def __init__(self, vllm_config, role): pass

class Good(KVConnectorBase_V1):
    def __init__(self, vllm_config, role, kv_cache_config):
        self.given = (vllm_config, role, kv_cache_config)

Old.__abstractmethods__ = Good.__abstractmethods__ = frozenset()
"""


@pytest.mark.skipif(_SPEC is None or _SPEC.origin is None, reason="vLLM is not installed")
def test_create_makes_connectors_of_vllm_and_nothing_else(folder, monkeypatch):
    module(folder, monkeypatch, "created", CREATED)
    monkeypatch.setattr(factory, "_REGISTRY", fresh())
    for name in ("Plain", "Abstract", "Old", "Good"):
        factory.register(name, "created", name)
    assert factory.connector_class("Plain").__name__ == "Plain"
    with pytest.raises(ConfigError, match=r"created\.Plain is no subclass of vLLM's KVConnectorBase_V1"):
        factory.create("Plain")
    with pytest.raises(ConfigError, match=r"created\.Abstract is abstract: it lacks build_connector_meta"):
        factory.create("Abstract", 1, 2, 3)
    with pytest.raises(ConfigError, match=r"created\.Old does not take kv_cache_config"):
        factory.create("Old", 1, 2)
    assert factory.create("Good", 1, 2, kv_cache_config=3).given == (1, 2, 3)


def test_a_module_that_ends_the_process_does_not(folder, monkeypatch):
    module(folder, monkeypatch, "ends", "import sys; sys.exit(3)")
    monkeypatch.setattr(factory, "_REGISTRY", fresh())
    factory.register("Ends", "ends", "Ends")
    with pytest.raises(ConfigError, match=r"ends:Ends cannot be imported: SystemExit"):
        factory.connector_class("Ends")


def test_what_is_no_name_is_unknown():
    with pytest.raises(ConfigError, match="KvmpConnector"):
        factory.connector_class(["KvmpConnector"])
