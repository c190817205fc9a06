"""Identity: what is built from a configuration and its workers, and what is refused (each fact: `test_identity`)."""

import json
import logging
import os
from types import SimpleNamespace

import fakes
import pytest
import torch

from kvmp.config import ConnectorConfig
from kvmp.vllm import compat, spec
from kvmp.vllm.metadata import PartMeta
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.weights import adapter_digest, local_weights_digest
from kvmp.vllm.worker import WorkerSide


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"header and weights")
    return tmp_path


def parts(count=1, layout='{"runs": 1}'):
    return {(0, i): PartMeta(i, 64, layout, '{"packing": "vec"}') for i in range(count)}


def digest(config, given=None):
    ordered = spec.ordered_parts(given or parts(config.parallel_config.tensor_parallel_size), config)
    return spec.build_spec(config, fakes.BLOCK, ordered).digest()


@pytest.mark.parametrize("verify", [False, True])
def test_the_configuration_says_all_facts_but_the_workers(model, verify):
    """What `kvmp doctor` compares before there is an engine."""
    config = fakes.engine_config(str(model))
    facts = spec.engine_facts(config, fakes.BLOCK, verify=verify)
    built = spec.build_spec(config, fakes.BLOCK, spec.ordered_parts(parts(), config), verify=verify).facts
    assert {key: value for key, value in built.items() if key != "workers"} == facts
    assert ("sums" in facts) is verify


def test_seed_counts_only_with_dummy_weights(model):
    for load_format, same in (("auto", True), ("dummy", False)):
        configs = [fakes.engine_config(str(model)) for _ in range(2)]
        for seed, config in enumerate(configs):
            config.load_config.load_format, config.model_config.seed = load_format, seed
        assert (digest(configs[0]) == digest(configs[1])) == same


def test_layout_size_and_place_of_the_model_files_count(model):
    config = fakes.engine_config(str(model))
    before = digest(config)
    assert digest(config, parts(layout='{"runs": 2}')) != before
    os.utime(model / "model.safetensors", (1, 1))
    assert digest(config) != before


def test_where_a_config_came_from_does_not_count(model):
    plain, other = fakes.engine_config(str(model)), fakes.engine_config(str(model))
    other.model_config.hf_config.to_dict = lambda: {"rope_theta": 10000.0, "hidden_size": 8, "_name_or_path": "else"}
    assert digest(plain) == digest(other)


def test_hash_seed(model, monkeypatch):
    config = fakes.engine_config(str(model))
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    before = digest(config)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert digest(config) != before
    monkeypatch.delenv("PYTHONHASHSEED")
    config.cache_config.prefix_caching_hash_algo = "xxhash"
    assert digest(config) != digest(config)


def test_parts_must_be_complete_and_in_place(model):
    config = fakes.engine_config(str(model), tp=2)
    with pytest.raises(spec.SpecRefusedError, match="2 workers"):
        spec.ordered_parts(parts(1), config)
    with pytest.raises(spec.SpecRefusedError, match="2 workers"):
        spec.ordered_parts({}, config)
    # A worker that failed while it described itself gives none.
    with pytest.raises(spec.SpecRefusedError, match=r"log of the worker of rank 1 has the cause"):
        spec.ordered_parts({(0, 0): PartMeta(0, 64), (0, 1): None}, config)
    # Under a MultiConnector every child is given the first child's.
    with pytest.raises(spec.SpecRefusedError, match="rank 0 answered with SimpleNamespace: a MultiConnector"):
        spec.ordered_parts({(0, 0): SimpleNamespace(agent="nixl"), (0, 1): PartMeta(1, 64)}, config)
    swapped = {(0, 0): PartMeta(1, 64), (0, 1): PartMeta(0, 64)}
    with pytest.raises(spec.SpecRefusedError, match="says it is rank 1"):
        spec.ordered_parts(swapped, config)
    with pytest.raises(spec.SpecRefusedError, match="no CUDA yet"):
        spec.ordered_parts({(0, 0): PartMeta(0, off="no CUDA yet"), (0, 1): PartMeta(1, 64)}, config)


def test_pipeline_stages_are_ordered_before_tensor_ranks(model):
    config = fakes.engine_config(str(model), tp=2)
    config.parallel_config.pipeline_parallel_size = 2
    given = {(pp, tp): PartMeta(pp * 2 + tp, 64) for pp in (1, 0) for tp in (1, 0)}
    assert [part.rank for part in spec.ordered_parts(given, config)] == [0, 1, 2, 3]


def test_run_time_scales_are_refused(model):
    config = fakes.engine_config(str(model))
    config.cache_config.calculate_kv_scales = True
    with pytest.raises(spec.SpecRefusedError, match="calculate_kv_scales"):
        digest(config)


def test_weights_and_adapters(tmp_path):
    assert local_weights_digest("org/model-on-a-hub") is None
    with pytest.raises(OSError, match="no adapter files"):
        adapter_digest(str(tmp_path / "none"))
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    before = adapter_digest(str(tmp_path)), local_weights_digest(str(tmp_path))
    content = bytearray(b"x" * 100_000)
    content[-1] = 0
    stamp = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(content)
    os.utime(tmp_path / "a", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    # An adapter is told by its bytes; a model, which is large, by names, sizes, times and headers.
    assert adapter_digest(str(tmp_path)) != before[0]
    assert local_weights_digest(str(tmp_path)) == before[1]


def test_context_parallel_engines_are_refused(model):
    config = fakes.engine_config(str(model))
    assert compat.unsupported_parallel(config) is None
    config.parallel_config.prefill_context_parallel_size = 2
    assert "prefill_context_parallel_size is 2" in compat.unsupported_parallel(config)


def test_a_large_model_fits_a_namespace_entry(model, monkeypatch):
    """80 layers, 8 ranks: a layout alone would be larger than the 16 KiB that the segment has for a whole spec."""
    monkeypatch.setattr(compat, "kernel_packing", lambda config, spec: "vec")
    config, cache = fakes.engine_config(str(model), tp=8), fakes.cache_config(8)
    given = {}
    for rank in range(8):
        monkeypatch.setattr(compat, "rank_in_engine", lambda rank=rank: (0, rank))
        side = WorkerSide(config, cache, ConnectorConfig(), logging.getLogger("test"), KvmpStats())
        side.register({f"model.layers.{i}.self_attn.attn": torch.zeros((8, 2, 4, 32)) for i in range(80)})
        given[0, rank] = side.part()
        assert given[0, rank].block_bytes == 80 * 2 * 4 * 32 * 4
    built = spec.build_spec(config, fakes.BLOCK, spec.ordered_parts(given, config))
    assert len(json.dumps(json.loads(built.to_json()), sort_keys=True)) < 16_320
    # What stands for the layout tells it apart all the same.
    side.register({f"model.layers.{i}.self_attn.attn": torch.zeros((8, 4, 2, 32)) for i in range(80)})
    other = {**given, (0, 7): side.part()}
    assert digest(config, other) != digest(config, given)
