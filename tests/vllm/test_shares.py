"""Ranks whose KV is equal: who they are, which part each has, and that one of them stores what all of them load."""

import math
from types import SimpleNamespace

import fakes
import pytest
import torch
from engine import PROMPT, stored, until
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from kvmp.vllm import compat
from kvmp.vllm.metadata import PartMeta
from kvmp.vllm.shares import share_parts

# Who is equal.


def full(heads=1, size=32, **fields):
    return FullAttentionSpec(block_size=fakes.BLOCK, num_kv_heads=heads, head_size=size, dtype=torch.float32, **fields)


def mla(**fields):
    return MLAAttentionSpec(block_size=fakes.BLOCK, num_kv_heads=1, head_size=576, dtype=torch.float32, **fields)


def equal_ranks(tp, heads=None, spec=None, said=None, **model):
    """What one rank of such an engine says; `said` is what vLLM's own configuration does."""
    config = fakes.engine_config("model", tp=tp)
    config.model_config.__dict__.update(model)
    if heads is not None:
        config.model_config.get_total_num_kv_heads = lambda: heads
        config.model_config.hf_text_config = SimpleNamespace(to_dict=lambda: {"num_key_value_heads": heads})
    cache = fakes.cache_config(8, spec=spec or full(max(1, (heads or 1) // tp)))
    if said is not None:
        cache.kv_tp_replicas = said
    return compat.equal_tp_ranks(config, cache)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_ranks_beyond_the_kv_heads_hold_copies(tp, heads):
    assert equal_ranks(tp, heads) == max(1, tp // heads)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_holds_the_whole_of_mla(tp, monkeypatch):
    """As vLLM says since 0.31; before, MLA's specs name no shards, and all of such a model's caches are replicated."""
    assert equal_ranks(tp, spec=mla(), said=tp, use_mla=True) == tp
    monkeypatch.setattr(compat, "_names_shards", lambda spec: False)
    assert equal_ranks(tp, spec=mla(), use_mla=True) == tp
    assert equal_ranks(tp, spec=mla(), use_mla=False) == 1


@pytest.mark.skipif(not hasattr(full(), "max_tp_shards"), reason="this vLLM's specs name no shards")
def test_an_mla_cache_that_names_no_shards_is_not_known_to_be_equal():
    assert equal_ranks(8, spec=mla(), use_mla=True) == 1


@pytest.mark.parametrize(
    "model",
    [
        {"hf_text_config": SimpleNamespace(to_dict=lambda: {"num_key_value_heads": 1, "swa_num_key_value_heads": 4})},
        {"hf_text_config": SimpleNamespace(to_dict=lambda: {"layers": [{"kv_heads": 1}, {"kv_heads": 2}]})},
        {"hf_text_config": SimpleNamespace(to_dict=lambda: {"num_kv_heads": [1, 1, 2]})},
        {"model_arch_config": SimpleNamespace(per_layer_overrides=[{}, {"total_num_kv_heads": 2}])},
    ],
)
def test_layers_of_different_heads_are_not_shared(model):
    assert equal_ranks(4, get_total_num_kv_heads=lambda: 1) == 4
    assert equal_ranks(4, get_total_num_kv_heads=lambda: 1, **model) == 1


def test_what_is_not_known_is_not_shared():
    assert equal_ranks(4) == 1  # no number of heads
    assert equal_ranks(4, heads=3) == 1
    assert equal_ranks(4, heads=1, spec=full(2)) == 1  # not one head a rank
    config = fakes.engine_config("model", tp=4)
    config.model_config.get_total_num_kv_heads = lambda: 1
    config.speculative_config = SimpleNamespace(method="eagle")
    assert compat.equal_tp_ranks(config, fakes.cache_config(8)) == 1
    config.speculative_config, config.parallel_config.decode_context_parallel_size = None, 2
    assert compat.equal_tp_ranks(config, fakes.cache_config(8)) == 1


@pytest.mark.parametrize("said", [None, 1])
def test_mixed_specs_are_shared_only_if_vllm_says_so(said):
    """Of MLA layers beside others, only some are replicated."""
    specs = {"a": mla(), "b": full()}
    mixed = UniformTypeKVCacheSpecs(block_size=fakes.BLOCK, kv_cache_specs=specs)
    assert equal_ranks(4, heads=1, spec=mixed, said=said, use_mla=True) == 1
    assert equal_ranks(4, heads=1, spec=mixed, said=2, use_mla=True) == 2


# Which part each has.


def ranks_of(tp, equal, pp=1, **changed):
    """What the workers say; `changed` gives a rank another layout: `r3={"layout_json": ...}`."""
    return [
        PartMeta(rank, **{"block_bytes": 64, "equal_ranks": equal[rank // tp], **changed.get(f"r{rank}", {})})
        for rank in range(tp * pp)
    ]


def parts_of(ranks, tp):
    """(part, whether it writes) of each rank."""
    return [(share.part, share.writes) for share in share_parts(ranks, tp)]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_lowest_rank_of_a_group_writes_its_part(tp, heads):
    equal = max(1, tp // heads)
    parts = parts_of(ranks_of(tp, [equal]), tp)
    assert parts == [(rank // equal, rank % equal == 0) for rank in range(tp)]
    assert sum(writes for _, writes in parts) == min(tp, math.ceil(tp / equal))


def test_each_pipeline_stage_has_parts_of_its_own():
    w, r = True, False
    both = parts_of(ranks_of(4, [2, 2], pp=2), 4)
    assert both == [(0, w), (0, r), (1, w), (1, r), (2, w), (2, r), (3, w), (3, r)]
    # Stages whose layers differ: all equal in the first, none in the second.
    assert parts_of(ranks_of(4, [4, 1], pp=2), 4) == [(0, w), (0, r), (0, r), (0, r), (1, w), (2, w), (3, w), (4, w)]


@pytest.mark.parametrize(
    "changed",
    [{"layout_json": '{"other": 1}'}, {"block_bytes": 128}, {"facts_json": '{"isa": "amx"}'}, {"equal_ranks": 1}],
)
def test_ranks_that_differ_share_nothing_and_the_others_do(changed):
    parts = parts_of(ranks_of(4, [2], r1=changed), 4)
    assert parts == [(0, True), (1, True), (2, True), (2, False)]


def test_a_number_that_does_not_divide_the_ranks_is_not_shared():
    assert parts_of(ranks_of(4, [3]), 4) == [(rank, True) for rank in range(4)]


# What they do.


def clients(server, role):
    return [client for client in server.clients if client.role == role]


def test_one_rank_stores_what_all_of_them_load(make, server):
    engine = make(ranks=4, heads=2)
    stored(engine)
    assert len(server.specs[0]["parts"]) == 2
    assert {part for _, part in server.arena} == {0, 1}
    assert engine.count("stored_blocks") == 4
    assert not engine.pool.pinned
    assert sorted(client.part for client in clients(server, "worker")) == [0, 1]
    assert sorted(client.part for client in clients(server, "reader")) == [0, 1]
    expected = [tensor[1:5].clone() for tensor in engine.tensors]
    for tensor in engine.tensors:
        tensor.zero_()
    again = fakes.request("again", PROMPT)
    assert engine.ask(again) == (16, True)
    assert engine.load(again, [11, 12, 13, 14, 15], 16)
    for tensor, right in zip(engine.tensors, expected, strict=True):
        assert right.any()
        assert torch.equal(tensor[11:15], right)


def test_a_reader_is_not_waited_for_when_a_store_ends(make, server):
    """Its copy thread does not even see the store."""
    engine = make(ranks=2, heads=1)
    engine.run_step(fakes.step({}))
    engine.workers[1]._worker._copier.store = None  # whatever it is given to store fails
    stored(engine)
    assert engine.count("stored_blocks") == 4
    assert not engine.pool.pinned
    assert not engine.count("errors")


def test_a_load_that_fails_on_a_reader_fails(make, server):
    engine = make(ranks=2, heads=1)
    stored(engine)
    clients(server, "reader")[0].hung_up = True
    server.closed_parts.add((clients(server, "reader")[0].engine_token, 0))
    engine.run_step(fakes.step({}))
    until(lambda: not engine.workers[1]._worker._copier._membership.joined, "the reader left")
    again = fakes.request("again", PROMPT)
    assert engine.ask(again) == (16, True)
    assert not engine.load(again, [11, 12, 13, 14, 15], 16)


def test_a_server_without_readers_serves_no_ranks_that_share(make, server, caplog_vllm):
    server.features = []
    engine = make(ranks=2, heads=1, attach=False)
    until(caplog_vllm.warnings, "the warning")
    assert "lets no ranks of equal KV share a part" in caplog_vllm.warnings()[0]
    assert all(client.closed for client in server.clients)
    server.features = ["readers"]
    until(engine.attached, "attached to the next server")
    assert make(ranks=2).attached()  # nor does one that shares nothing need it
