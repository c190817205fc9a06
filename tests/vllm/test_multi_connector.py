"""kvmp as one of a MultiConnector's children: vLLM's own class, beside a connector that wishes for a layout."""

import copy
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import fakes
import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvmp.vllm import compat
from kvmp.vllm.connector import KvmpConnector


class WishesHeadsFirst(KVConnectorBase_V1):
    """A connector of somebody else's, that wishes for the layout most of vLLM's own do."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config):
        return "LBHNC"

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)

    get_num_new_matched_tokens = update_state_after_alloc = build_connector_meta = None
    start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = None


def child(name, module):
    return {"kv_connector": name, "kv_connector_module_path": module, "kv_role": "kv_both"}


CHILDREN = [child("KvmpConnector", "kvmp.vllm.connector"), child("WishesHeadsFirst", __name__)]


@pytest.fixture
def config(tmp_path):
    """A configuration of vLLM's, as far as both connectors read it, for blocks of vLLM's own size."""
    config = fakes.engine_config(str(tmp_path))
    vars(config.cache_config).update(block_size=16, user_specified_block_size=False)
    config.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=True)
    return config


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(compat, "_is_cuda", lambda: True)


def multi(config, **given):
    config = copy.copy(config)
    extra = {"connectors": CHILDREN}
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config=extra, **given
    )
    return config


def test_alone_it_wishes_for_blocks_outermost_on_cuda_only(config, monkeypatch):
    for is_cuda, wish in ((True, "BLHNC"), (False, None)):
        monkeypatch.setattr(compat, "_is_cuda", lambda is_cuda=is_cuda: is_cuda)
        assert KvmpConnector.get_required_kvcache_layout(config) == wish


@pytest.mark.usefixtures("on_cuda")
def test_beside_another_connector_it_leaves_the_layout_to_that_one(config):
    assert MultiConnector.get_required_kvcache_layout(multi(config)) == "LBHNC"
    assert KvmpConnector.get_required_kvcache_layout(config) == "BLHNC", "alone again"


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("tokens", "chosen", "wish"),
    [(16, True, "BLHNC"), (64, False, "BLHNC"), (128, True, None), (None, False, "BLHNC")],
)
def test_blocks_that_a_kernel_may_have_to_cut_are_left_where_they_are(config, tokens, chosen, wish):
    config.cache_config = SimpleNamespace(block_size=tokens, user_specified_block_size=chosen)
    assert KvmpConnector.get_required_kvcache_layout(config) == wish


@pytest.mark.usefixtures("on_cuda")
def test_a_model_that_it_does_not_serve_keeps_its_layout(config):
    config.model_config.is_hybrid = True
    assert KvmpConnector.get_required_kvcache_layout(config) is None


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_it_says_that_the_others_policy_ends_requests(config, caplog, monkeypatch, policy):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    outer = multi(config, kv_load_failure_policy=policy)
    MultiConnector(outer, KVConnectorRole.SCHEDULER, fakes.cache_config())
    # A set, as some of vLLM's versions hand a record on twice.
    said = {text for text in map(logging.LogRecord.getMessage, caplog.records) if "kv_load_failure_policy" in text}
    assert len(said) == (policy == "fail")
    assert all("is 'fail'; set it to 'recompute'," in text for text in said)
    assert outer.kv_transfer_config.kv_load_failure_policy == policy, "the others' too, so not ours to change"


def test_the_counters_find_their_class_where_plugins_are_hidden():
    """In vLLM's front end, where nothing but the module's path says what kvmp's connector is."""
    looked_up = (
        "import kvmp.vllm.connector as ours\n"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory\n"
        "assert KVConnectorFactory.get_connector_class_by_name('KvmpConnector') is ours.KvmpConnector\n"
    )
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    subprocess.run([sys.executable, "-c", looked_up], env=environment, check=True, timeout=100)


def test_the_names_of_the_calls_that_are_looked_for_are_vllms():
    names = {MultiConnector.__init__.__qualname__, MultiConnector.get_required_kvcache_layout.__qualname__}
    assert names == set(compat._MULTI_CONNECTOR_CALLS)
