"""`translate` against what the installed vLLM's own `VllmConfig` computes."""

import sys
from types import ModuleType

import pytest
import vllm
from vllm.config import CacheConfig, ParallelConfig, VllmConfig
from vllm.config import KVTransferConfig as TheirTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from kvmp.config import ConfigError, KVTransferConfig, OffloadingConfig, translate

# vLLM imports parts of itself while it makes a config; what torch warns of then is its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

CONNECTORS = ["OffloadingConnector", "SimpleCPUOffloadConnector", "LMCacheMPConnector", "NixlConnector"]
HAS_OLD_FIELDS = "kv_ip" in TheirTransferConfig.__dataclass_fields__

TRANSFERS = {
    "none": None,
    "empty": KVTransferConfig(engine_id="e"),
    "another connector": KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_producer", engine_id="e"),
    "settings": KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        engine_id="e",
        kv_port=7,
        kv_buffer_device="cpu",
        enable_permute_local_kv=True,
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"a": [1, {"b": 2}], "lmcache.mp.port": 6000, "kvmp.timeout_ms": 5},
    ),
    "an old size": KVTransferConfig(engine_id="e", kv_connector_extra_config={"cpu_bytes_to_use": 1}),
    "a module path": KVTransferConfig(
        kv_connector="X", kv_role="kv_both", engine_id="e", kv_connector_module_path="stand_ins"
    ),
}


class StandIn(KVConnectorBase_V1, SupportsHMA):
    """Stands where vLLM looks for a connector whose package is not installed; never made."""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    module = ModuleType("stand_ins")
    for name in CONNECTORS:
        monkeypatch.setitem(KVConnectorFactory._registry, name, lambda: StandIn)
        setattr(module, name, StandIn)
    monkeypatch.setitem(sys.modules, "stand_ins", module)


def theirs(size, backend, transfer, ranks=1):
    """What vLLM makes of the flags."""
    given = None if transfer is None else transfer.to_vllm()
    cache = CacheConfig(kv_offloading_size=size, kv_offloading_backend=backend)
    parallel = ParallelConfig(
        tensor_parallel_size=ranks, pipeline_parallel_size=ranks, distributed_executor_backend="mp"
    )
    made = VllmConfig(cache_config=cache, kv_transfer_config=given, parallel_config=parallel)
    assert made.parallel_config.tensor_parallel_size == made.parallel_config.pipeline_parallel_size == ranks
    return made.kv_transfer_config


def plain(config):
    """Every field but the engine's id, which vLLM makes up when none is given."""
    if config is None:
        return None
    fields = {name: getattr(config, name) for name in TheirTransferConfig.__dataclass_fields__}
    return fields | {"engine_id": fields["engine_id"] == "e"}


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
@pytest.mark.parametrize("size", [4, 4.0, 0.3])
@pytest.mark.parametrize(("backend", "simple"), [("native", False), ("native", True), ("lmcache", False)])
def test_the_result_is_vllms_own(monkeypatch, transfer, size, backend, simple):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", str(int(simple)))
    ours = translate(OffloadingConfig.from_env(size_gib=size, backend=backend), transfer)
    assert plain(ours and ours.to_vllm()) == plain(theirs(size, backend, transfer))


@pytest.mark.parametrize(("backend", "simple"), [("native", False), ("native", True), ("lmcache", False)])
def test_ranks_divide_nothing_for_vllm_too(monkeypatch, backend, simple):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", str(int(simple)))
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    ours = translate(OffloadingConfig.from_env(size_gib=4.0, backend=backend, **sizes))
    assert plain(ours.to_vllm()) == plain(theirs(4.0, backend, None, ranks=2))


# With no size vLLM refuses a transfer config that has no connector, or one whose class it cannot find.
@pytest.mark.parametrize("name", ["none", "another connector", "settings"])
@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_no_size_changes_nothing_for_vllm_too(name, backend):
    ours = translate(OffloadingConfig(None, backend), TRANSFERS[name])
    assert plain(ours and ours.to_vllm()) == plain(theirs(None, backend, TRANSFERS[name]))


def test_the_comparison_sees_a_difference():
    ours = translate(OffloadingConfig(8.0, "native"))
    assert plain(ours.to_vllm()) != plain(theirs(4.0, "native", None))


@pytest.mark.parametrize("text", ["0", "1", "2", " 1 "])
def test_the_environment_means_what_it_means_to_vllm(monkeypatch, text):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", text)
    ours = translate(OffloadingConfig.from_env(size_gib=4.0, backend="native"))
    assert ours.kv_connector == theirs(4.0, "native", None).kv_connector


def test_kvmps_result_is_a_config_of_vllm():
    made = translate(OffloadingConfig(4.0, "kvmp")).to_vllm()
    assert isinstance(made, TheirTransferConfig)
    assert KVConnectorFactory.get_connector_class(made).__name__ == "KvmpConnector"


@pytest.mark.parametrize("name", [name for name, transfer in TRANSFERS.items() if transfer])
def test_there_and_back(name):
    made = TRANSFERS[name].to_vllm()
    back = KVTransferConfig.from_vllm(made)
    assert plain(back.to_vllm()) == plain(made)
    assert back.kv_connector_extra_config is not made.kv_connector_extra_config
    assert TheirTransferConfig(**back.as_dict(vllm.__version__)) == made


def test_old_fields_are_there_exactly_where_vllm_has_them():
    config = KVTransferConfig(kv_ip="10.0.0.1", kv_rank=1)
    if HAS_OLD_FIELDS:
        assert (config.to_vllm().kv_ip, config.to_vllm().kv_rank) == ("10.0.0.1", 1)
        assert config.as_dict(vllm.__version__)["kv_rank"] == 1
        return
    for call in (config.to_vllm, lambda: config.as_dict(vllm.__version__)):
        with pytest.raises(ConfigError, match="kv_ip, kv_rank: set, but vLLM"):
            call()


def test_every_field_of_vllms_is_one_of_ours():
    assert TheirTransferConfig.__dataclass_fields__.keys() <= KVTransferConfig.__dataclass_fields__.keys()
