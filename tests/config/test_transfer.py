"""`KVTransferConfig`: each version gets what it knows."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest

from kvmp.config import ConfigError, KVTransferConfig

OLD = {"kv_buffer_size": 5e8, "kv_rank": 1, "kv_parallel_size": 2, "kv_ip": "10.0.0.1"}


def test_only_what_was_set_is_written():
    config = KVTransferConfig(kv_connector="KvmpConnector", kv_role="kv_both", kv_connector_extra_config={"a": [1]})
    written = {"kv_connector": "KvmpConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"a": [1]}}
    assert config.as_dict("0.29.0") == config.as_dict("0.33.0") == written
    assert json.loads(config.to_json("0.32.0+cpu")) == written
    assert KVTransferConfig().as_dict("0.32.0") == {}


@pytest.mark.parametrize("version", ["0.29.0", "0.30", "0.31.2rc1", "v0.31.0"])
def test_versions_that_have_the_old_fields_get_them(version):
    assert KVTransferConfig(**OLD).as_dict(version) == OLD


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0+cpu", "1.0"])
@pytest.mark.parametrize("name", OLD)
def test_an_old_field_is_refused_for_a_version_without_it(version, name):
    with pytest.raises(ConfigError, match=f"{name}: set, but vLLM"):
        KVTransferConfig(**{name: OLD[name]}).as_dict(version)


def test_what_is_no_version_is_refused():
    with pytest.raises(ConfigError, match="version: 'new' given"):
        KVTransferConfig().as_dict("new")
    with pytest.raises(ConfigError, match="version: None given"):
        KVTransferConfig().as_dict(None)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_connector": 5},
        {"kv_role": "both"},
        {"kv_port": "5"},
        {"kv_port": True},
        {"kv_port": None},
        {"kv_connector_extra_config": [1]},
        {"enable_permute_local_kv": 1},
        {"kv_load_failure_policy": "retry"},
        {"kv_rank": 1.5},
    ],
)
def test_a_wrong_value_is_named(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}: .* given, allowed is "):
        KVTransferConfig(**fields)


def test_the_extra_config_is_a_copy_in_and_out():
    extra = {"a": {"b": [1]}}
    config = KVTransferConfig(kv_connector_extra_config=extra)
    extra["a"]["b"].append(2)
    config.as_dict("0.32.0")["kv_connector_extra_config"]["a"]["b"].append(3)
    assert config.kv_connector_extra_config == {"a": {"b": [1]}}


def test_it_can_be_copied_and_sent():
    config = KVTransferConfig(kv_connector="X", kv_connector_extra_config={"a": [1]})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_what_json_cannot_hold_is_named():
    with pytest.raises(ConfigError, match="kv_connector_extra_config: cannot be written as JSON"):
        KVTransferConfig(kv_connector_extra_config={"a": object()}).to_json("0.32.0")


def test_old_fields_at_vllms_default_count_as_not_given():
    defaults = {"kv_buffer_size": 1e9, "kv_rank": None, "kv_parallel_size": 1, "kv_ip": "127.0.0.1"}
    theirs = SimpleNamespace(kv_connector="X", kv_role="kv_both", **defaults)
    ours = KVTransferConfig.from_vllm(theirs)
    assert ours == KVTransferConfig(kv_connector="X", kv_role="kv_both")
    assert KVTransferConfig.from_vllm(SimpleNamespace(**OLD)) == KVTransferConfig(**OLD)


HIDDEN = {"kv_connector": "ExampleHiddenStatesConnector"}


@pytest.mark.parametrize(
    "children",
    [
        [HIDDEN],
        (HIDDEN,),
        [KVTransferConfig(**HIDDEN)],
        [
            {
                "kv_connector": "MultiConnector",
                "kv_connector_extra_config": {"connectors": [{"kv_connector": "X"}, HIDDEN]},
            }
        ],
    ],
)
def test_a_child_is_found_however_it_is_given(children):
    config = KVTransferConfig(kv_connector="MultiConnector", kv_connector_extra_config={"connectors": children})
    assert config.has_connector("ExampleHiddenStatesConnector")
    assert not config.has_connector("Y")


def test_tuples_are_copied_too():
    inner = {"b": 1}
    config = KVTransferConfig(kv_connector_extra_config={"a": (inner,)})
    inner["b"] = 2
    assert config.kv_connector_extra_config == {"a": ({"b": 1},)}


@pytest.mark.parametrize("theirs", [None, {"kv_connector": "X"}, 5])
def test_what_is_no_config_of_vllms_is_refused(theirs):
    with pytest.raises(ConfigError, match="theirs: "):
        KVTransferConfig.from_vllm(theirs)
