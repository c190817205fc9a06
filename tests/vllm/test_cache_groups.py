"""Engines with layers of several kinds: one KV-cache group where vLLM can unite them, nothing changed elsewhere."""

import copy
import dataclasses
import logging
from types import SimpleNamespace

import fakes
import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1 import kv_cache_interface as kinds
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.engine.core import EngineCore

from kvmp.vllm import cache_groups, compat
from kvmp.vllm.connector import KvmpConnector

SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = kinds.FullAttentionSpec(**SIZES)
WINDOW = kinds.SlidingWindowSpec(**SIZES, sliding_window=64)
FOREIGN = kinds.SinkFullAttentionSpec(**SIZES, sink_len=16)
STATE = kinds.MambaSpec(shapes=((4, 128),), dtypes=(torch.float32,), block_size=16)


@pytest.fixture
def config(tmp_path):
    config = fakes.engine_config(str(tmp_path))
    vars(config.cache_config).update(block_size=16, user_specified_block_size=False, kv_cache_layout=None)
    config.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="KvmpConnector", kv_connector_module_path="kvmp.vllm.connector", kv_role="kv_both"
    )
    return config


class Core:
    """As much of the engine core as asks for a layout: vLLM's own resolution, called under the same name."""

    def initialize(self, config, *workers):
        kv_cache_specs = list(workers)
        flat = [spec for specs in kv_cache_specs for spec in specs.values()]
        resolve_kv_cache_layout(config, [["LBNHC", "BLHNC"]] * len(workers), flat)
        return config.scheduler_config.disable_hybrid_kv_cache_manager

    initialize.__code__ = initialize.__code__.replace(co_qualname="EngineCore._initialize_kv_caches")


def test_windows_beside_full_attention_are_kept_in_one_group(config):
    assert Core().initialize(config, {"0": FULL, "1": WINDOW})


def test_layers_of_all_pipeline_stages_are_looked_at(config):
    assert Core().initialize(config, {"0": FULL}, {"1": WINDOW})
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    config.cache_config.kv_cache_layout = None
    assert not Core().initialize(config, {"0": FULL}, {"1": WINDOW, "2": STATE})


def test_a_multi_connectors_child_does_the_same_and_wishes_for_no_layout(config, monkeypatch):
    monkeypatch.setattr(compat, "_is_cuda", lambda: True)
    child = {"kv_connector": "KvmpConnector", "kv_connector_module_path": "kvmp.vllm.connector", "kv_role": "kv_both"}
    multi = copy.copy(config)
    multi.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": [child]}
    )
    assert Core().initialize(multi, {"0": FULL, "1": WINDOW})
    assert multi.cache_config.kv_cache_layout == "LBNHC"


@pytest.mark.parametrize(
    ("spec", "united"),
    [(FULL, False), (dataclasses.replace(FULL, sliding_window=64), True), (WINDOW, False), (STATE, False)],
    ids=["full", "full of a window", "window", "state"],
)
def test_a_workers_copy_of_the_configuration_says_the_same(config, spec, united):
    KvmpConnector(config, KVConnectorRole.WORKER, fakes.cache_config(spec=spec))
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is united


def test_a_layout_of_the_users_own_leaves_several_groups_and_the_reason_says_the_mend(config, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    assert not Core().initialize(config, {"0": FULL, "1": WINDOW}), "vLLM asks no connector then"
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in (FULL, WINDOW)]
    reason = reason_for(groups)
    assert reason.endswith("start vLLM with --disable-hybrid-kv-cache-manager")
    assert "--disable" not in reason_for([*groups, SimpleNamespace(kv_cache_spec=STATE)])


def reason_for(groups):
    return cache_groups.unsupported_cache(SimpleNamespace(kv_cache_groups=groups))


@pytest.mark.parametrize(
    "specs",
    [
        {"0": FULL},
        {"0": WINDOW},
        {"0": WINDOW, "1": dataclasses.replace(WINDOW, sliding_window=32)},
        {"0": FULL, "1": STATE},
        {"0": FULL, "1": WINDOW, "2": STATE},
        {"0": FULL, "1": WINDOW, "2": FOREIGN},
        {"0": STATE},
        {},
    ],
    ids=["full", "window", "two windows", "full and state", "all", "one not known", "state", "none"],
)
def test_what_is_of_one_kind_or_cannot_be_united_stays_as_it_is(config, specs, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert not Core().initialize(config, specs)
    assert "Hybrid KV cache manager is disabled" not in caplog.text, "vLLM says so of what it was only asked to try"


@pytest.mark.parametrize(
    ("specs", "layout"),
    [
        ({"0": FULL}, "BLHNC"),
        ({"0": FULL, "1": WINDOW}, "BLHNC"),
        ({"0": FULL, "1": STATE}, "LBNHC"),
        ({"0": WINDOW}, "LBNHC"),
        ({"0": FOREIGN}, "LBNHC"),
    ],
    ids=["full", "mixed", "with a state", "windows alone", "not known to kvmp"],
)
def test_blocks_outermost_are_wished_for_where_kvmp_serves(config, specs, layout, monkeypatch):
    monkeypatch.setattr(compat, "_is_cuda", lambda: True)
    Core().initialize(config, specs)
    assert config.cache_config.kv_cache_layout == layout


def test_an_engine_that_kvmp_does_not_serve_stays_as_it_is(config, monkeypatch):
    config.parallel_config.decode_context_parallel_size = 2
    assert not Core().initialize(config, {"0": FULL, "1": WINDOW})
    config.parallel_config.decode_context_parallel_size = 1
    config.cache_config.kv_cache_layout = None
    config.cache_config.enable_prefix_caching = False
    assert not Core().initialize(config, {"0": FULL, "1": WINDOW})
    config.cache_config.kv_cache_layout = None
    config.cache_config.enable_prefix_caching = True
    config.model_config.enable_sleep_mode = True
    monkeypatch.setattr(compat, "_is_cuda", lambda: True)
    monkeypatch.setattr(compat, "VERSION", (0, 32))
    assert not Core().initialize(config, {"0": FULL, "1": WINDOW})


def test_asked_for_a_layout_by_somebody_else_it_changes_nothing(config):
    KvmpConnector.get_required_kvcache_layout(config)
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


def test_vllm_leaves_its_hybrid_manager_on_for_it(config):
    assert KVConnectorFactory.supports_hma_config(config.kv_transfer_config)


def test_where_it_looks_is_vllms_own_code():
    code = EngineCore._initialize_kv_caches
    code = getattr(code, "__wrapped__", code).__code__
    assert code.co_qualname == compat._GROUPING_CALL


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([], "the engine has no KV cache"),
        ([FULL, WINDOW], "the engine has 2 KV-cache groups, of FullAttentionSpec, SlidingWindowSpec"),
        ([WINDOW], "layers are of vllm.v1.kv_cache_interface.SlidingWindowSpec, which kvmp does not serve"),
        ([dataclasses.replace(FULL, non_causal=True)], "layers attend to later tokens"),
    ],
)
def test_the_reason_it_is_off_names_what_is_there(specs, said):
    assert said in reason_for([SimpleNamespace(kv_cache_spec=spec) for spec in specs])


@pytest.mark.parametrize("caching", [True, False])
def test_an_engine_that_reuses_no_prefix_itself_is_not_served(config, caching, caplog, monkeypatch):
    """So vLLM is for models that cannot go on from a prefix, such as a pooler of all tokens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config.cache_config.enable_prefix_caching = caching
    KvmpConnector(config, KVConnectorRole.SCHEDULER, fakes.cache_config())
    assert ("kvmp is switched off: vLLM's prefix caching is off" in caplog.text) is not caching
