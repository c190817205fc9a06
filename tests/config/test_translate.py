"""The table of issue 4, row by row, and what must hold whatever is given."""

import copy
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmp.config import ConfigError, KVTransferConfig, OffloadingConfig, translate

GIB = 2.0**30
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (8, 4)]


def offloading(size, backend, tp=1, pp=1, **fields):
    return OffloadingConfig(size, backend, tensor_parallel_size=tp, pipeline_parallel_size=pp, **fields)


@pytest.mark.parametrize("backend", ["native", "lmcache", "kvmp", "unheard-of"])
def test_no_size_switches_offloading_off_and_the_backend_is_ignored(backend):
    transfer = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_producer")
    assert translate(OffloadingConfig(None, backend)) is None
    assert translate(OffloadingConfig(None, backend), transfer) is transfer


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize(("simple", "connector"), [(False, "OffloadingConnector"), (True, "SimpleCPUOffloadConnector")])
def test_native_gets_the_total_of_all_ranks(simple, connector, tp, pp):
    result = translate(offloading(4.0, "native", tp, pp, simple=simple))
    assert result == KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": 4.0 * GIB}
    )
    assert isinstance(result.kv_connector_extra_config["cpu_bytes_to_use"], float)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("size", [4.0, 8.0])
def test_lmcache_gets_no_size(size, tp, pp):
    result = translate(offloading(size, "lmcache", tp, pp))
    assert result == KVTransferConfig(kv_connector="LMCacheMPConnector", kv_role="kv_both")
    # Nothing stands there, so LMCache's own default holds: tcp://localhost, 5555.
    assert result.kv_connector_extra_config == {}


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("size", [0.001, 1, 4.0, 1000])
def test_kvmp_gets_no_size(size, tp, pp):
    assert translate(offloading(size, "kvmp", tp, pp)) == KVTransferConfig(
        kv_connector="KvmpConnector", kv_role="kv_both", kv_connector_module_path="kvmp.vllm.connector"
    )


@pytest.mark.parametrize(
    ("size", "extra", "spawn_size"),
    [
        (8, {"kvmp.on_unreachable": "spawn"}, "8GiB"),
        (8.0, {"kvmp.on_unreachable": "spawn"}, "8GiB"),
        (1.5, {"kvmp.on_unreachable": "spawn"}, "1610612736"),
        (8, {"kvmp.on_unreachable": "spawn", "kvmp.spawn_size": "1MiB"}, "1MiB"),
        (8, {"kvmp.on_unreachable": "fail"}, None),
        (8, {}, None),
    ],
)
def test_a_server_that_kvmp_itself_starts_gets_the_size(size, extra, spawn_size):
    result = translate(offloading(size, "kvmp"), KVTransferConfig(kv_connector_extra_config=extra))
    assert result.kv_connector_extra_config.get("kvmp.spawn_size") == spawn_size


@pytest.mark.parametrize("backend", ["native", "lmcache", "kvmp"])
def test_what_was_given_survives_but_connector_and_role(backend):
    extra = {"a": [1, {"b": 2}], "lmcache.mp.port": 6000, "kvmp.timeout_ms": 5}
    transfer = KVTransferConfig(
        kv_connector="NixlConnector",
        kv_role="kv_producer",
        engine_id="mine",
        kv_port=7,
        kv_load_failure_policy="recompute",
        kv_ip="10.0.0.1",
        kv_connector_extra_config=extra,
    )
    result = translate(offloading(4.0, backend), transfer)
    assert result.kv_role == "kv_both"
    assert result.kv_connector not in (None, "NixlConnector")
    assert (result.engine_id, result.kv_port, result.kv_load_failure_policy) == ("mine", 7, "recompute")
    assert result.kv_ip == "10.0.0.1"
    assert extra.items() <= dict(result.kv_connector_extra_config).items()


@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_a_foreign_module_path_stays_as_vllm_leaves_it_but_not_for_kvmp(backend):
    transfer = KVTransferConfig(kv_connector="X", kv_role="kv_both", kv_connector_module_path="x")
    assert translate(offloading(4.0, backend), transfer).kv_connector_module_path == "x"
    assert translate(offloading(4.0, "kvmp"), transfer).kv_connector_module_path == "kvmp.vllm.connector"


HIDDEN = KVTransferConfig(kv_connector="ExampleHiddenStatesConnector", kv_role="kv_producer")
HIDDEN_CHILD = KVTransferConfig(
    kv_connector="MultiConnector",
    kv_role="kv_both",
    kv_connector_extra_config={"connectors": [{"kv_connector": "ExampleHiddenStatesConnector"}]},
)


@pytest.mark.parametrize("transfer", [HIDDEN, HIDDEN_CHILD])
@pytest.mark.parametrize("backend", ["native", "lmcache", "kvmp"])
@pytest.mark.parametrize("size", [None, 4.0])
def test_hidden_states_and_chunked_prefill_exclude_each_other(transfer, backend, size):
    with pytest.raises(ValueError, match="--no-enable-chunked-prefill"):
        translate(offloading(size, backend, chunked_prefill=True), transfer)
    assert translate(offloading(size, backend, chunked_prefill=False), transfer) is not None


@pytest.mark.parametrize("backend", ["native", "lmcache", "kvmp"])
def test_chunked_prefill_is_fine_with_every_other_connector(backend):
    transfer = KVTransferConfig(kv_connector="MultiConnector", kv_connector_extra_config={"connectors": None})
    assert translate(offloading(4.0, backend, chunked_prefill=True), transfer) is not None
    assert translate(offloading(4.0, backend, chunked_prefill=True)) is not None


@pytest.mark.parametrize("size", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, "4", [4], 10**400, 1e308])
@pytest.mark.parametrize("backend", ["native", "lmcache", "kvmp"])
def test_what_is_no_size_is_refused(size, backend):
    with pytest.raises(ConfigError, match=r"size_gib: .* given, allowed is a finite number of GiB above zero"):
        OffloadingConfig(size, backend)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("kvpm", "backend: 'kvpm' given, allowed is 'native' or 'lmcache' or 'kvmp'; did you mean 'kvmp'?"),
        ("LMCache", "did you mean 'lmcache'?"),
        ("zzz", "backend: 'zzz' given"),
        (None, "backend: None given"),
        (["kvmp"], "given"),
    ],
)
def test_an_unknown_backend_is_named_with_the_nearest(backend, text):
    with pytest.raises(ConfigError) as caught:
        OffloadingConfig(4.0, backend)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor_parallel_size": 0},
        {"tensor_parallel_size": True},
        {"pipeline_parallel_size": 1.0},
        {"chunked_prefill": 1},
        {"simple": "1"},
    ],
)
def test_other_wrong_flags_are_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        OffloadingConfig(4.0, "native", **fields)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"kvmp.endpont": "unix:/s"}, "mean 'kvmp.endpoint'"),
        ({"kvmp.timeout_ms": "5"}, "'5' given"),
        ({"timeout_ms": 5}, "mean 'kvmp.timeout_ms'"),
    ],
)
def test_keys_of_kvmp_are_checked_under_every_backend(extra, text):
    transfer = KVTransferConfig(kv_connector_extra_config=extra)
    for backend in ("kvmp", "native", "lmcache"):
        if backend != "kvmp" and not all(key.startswith("kvmp.") for key in extra):
            continue  # a key without the prefix may be another connector's
        with pytest.raises(ConfigError) as caught:
            translate(offloading(4.0, backend), transfer)
        assert text in str(caught.value)


@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_keys_of_another_connector_are_its_own(backend):
    extra = {"endpoint": 1, "timeout_ms": "x"}
    made = translate(offloading(4.0, backend), KVTransferConfig(kv_connector_extra_config=extra))
    assert extra.items() <= dict(made.kv_connector_extra_config).items()


def test_what_is_no_config_is_refused():
    with pytest.raises(ConfigError, match="offloading"):
        translate({"size_gib": 4.0})
    with pytest.raises(ConfigError, match="from_vllm"):
        translate(offloading(4.0, "native"), {"kv_connector": "X"})


@pytest.mark.parametrize(("text", "simple"), [("0", False), ("1", True), ("2", True), (" 1 ", True)])
def test_the_environment_is_read_by_vllms_rule(text, simple):
    environ = {"VLLM_USE_SIMPLE_KV_OFFLOAD": text}
    assert OffloadingConfig.from_env(environ, size_gib=4.0, backend="native").simple is simple


def test_the_environment_is_read_by_from_env_only(monkeypatch):
    assert OffloadingConfig.from_env({}, size_gib=4.0, backend="native") == OffloadingConfig(4.0, "native")
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    assert OffloadingConfig.from_env(size_gib=4.0, backend="native").simple
    assert translate(OffloadingConfig(4.0, "native")).kv_connector == "OffloadingConnector"


@pytest.mark.parametrize("text", ["true", "", "1.0"])
def test_what_vllm_cannot_read_is_named(text):
    with pytest.raises(ConfigError, match="VLLM_USE_SIMPLE_KV_OFFLOAD"):
        OffloadingConfig.from_env({"VLLM_USE_SIMPLE_KV_OFFLOAD": text}, size_gib=4.0, backend="native")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_EXTRAS = st.dictionaries(st.text().map("other.".__add__), _JSON, max_size=5)
_TRANSFERS = st.builds(
    KVTransferConfig,
    kv_connector=st.none() | st.sampled_from(["NixlConnector", "MultiConnector"]),
    engine_id=st.none() | st.text(),
    kv_role=st.sampled_from([None, "kv_producer", "kv_consumer", "kv_both"]),
    kv_port=st.integers(1, 65535),
    kv_connector_extra_config=_EXTRAS,
    kv_ip=st.none() | st.text(),
)
_OFFLOADINGS = st.builds(
    OffloadingConfig,
    size_gib=st.none() | st.floats(0.001, 1e6) | st.integers(1, 10**6),
    backend=st.sampled_from(["native", "lmcache", "kvmp"]),
    tensor_parallel_size=st.integers(1, 8),
    simple=st.booleans(),
)


@given(_OFFLOADINGS, _TRANSFERS)
def test_the_callers_object_is_never_changed_and_other_keys_survive(flags, transfer):
    before = copy.deepcopy((flags, transfer))
    result = translate(flags, transfer)
    assert (flags, transfer) == before
    assert transfer.kv_connector_extra_config.items() <= result.kv_connector_extra_config.items()
    assert (result.engine_id, result.kv_port, result.kv_ip) == (transfer.engine_id, transfer.kv_port, transfer.kv_ip)
    if flags.size_gib is not None:
        assert result.kv_role == "kv_both"
        # The result holds nothing that the caller's object holds: a change of the one is none of the other.
        for key, value in result.kv_connector_extra_config.items():
            assert not isinstance(value, (list, dict)) or value is not transfer.kv_connector_extra_config[key]


def test_importing_and_translating_needs_neither_torch_numpy_nor_vllm():
    code = (
        "import sys, kvmp.config, kvmp.factory\n"
        "from kvmp.config import *\n"
        "translate(OffloadingConfig(1, 'kvmp'), KVTransferConfig(kv_connector='X'))\n"
        "translate(OffloadingConfig.from_env({}, size_gib=1, backend='native')).to_json('0.32.0')\n"
        "ConnectorConfig.read({}, {}), kvmp.factory.names()\n"
        "print({'torch', 'numpy', 'vllm'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
