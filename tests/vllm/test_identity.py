"""Every fact of an engine's identity separates: a table of them, and a test that a new fact is not forgotten in it."""

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvmp.config import ConnectorConfig
from kvmp.namespace import NamespaceSpec
from kvmp.vllm import compat, spec
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.worker import WorkerSide


@dataclass
class Engine:
    """What a namespace spec is made of: configuration, workers with real tensors, files."""

    folder: Path
    patch: pytest.MonkeyPatch
    verify: bool = True
    layers: dict[str, torch.Tensor] = field(default_factory=lambda: {"layer.0": torch.zeros((8, 1, fakes.BLOCK, 64))})
    after: dict[str, Any] = field(default_factory=dict)
    """Fields of the spec that the connector sets once it is built."""

    def __post_init__(self):
        for name in ("model", "draft"):
            (self.folder / name).mkdir()
            (self.folder / name / "model.safetensors").write_bytes(b"header and weights")
        self.config, self.cache = fakes.engine_config(str(self.folder / "model")), fakes.cache_config(8)
        draft = {"method": "eagle", "model": str(self.folder / "draft"), "revision": "of the draft"}
        self.config.speculative_config = fakes.SimpleNamespace(**draft)
        self.isa("vec")

    def isa(self, name: str) -> None:
        self.patch.setattr(cpu_attn, "_get_attn_isa", lambda *args, **kwargs: name)

    def layer(self, **fields: Any) -> None:
        plain = {"block_size": fakes.BLOCK, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        self.cache.kv_cache_groups[0].kv_cache_spec = FullAttentionSpec(**plain | fields)

    def spec(self) -> NamespaceSpec:
        """As the scheduler side builds it, from parts that real worker sides give."""
        parallel, given = self.config.parallel_config, {}
        for pp in range(parallel.pipeline_parallel_size):
            for tp in range(parallel.tensor_parallel_size):
                self.patch.setattr(compat, "rank_in_engine", lambda rank=(pp, tp): rank)
                side = WorkerSide(self.config, self.cache, ConnectorConfig(), logging.getLogger("test"), KvmpStats())
                side.register(self.layers)
                given[pp, tp] = side.part()
        tokens = compat.hash_block_tokens(self.config, self.cache)
        built = spec.build_spec(self.config, tokens, spec.ordered_parts(given, self.config), verify=self.verify)
        return dataclasses.replace(built, **self.after)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    return Engine(tmp_path, monkeypatch)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of a spec by its path, list places left out."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for inner in value for k, v in leaves(inner, path).items()}
    return {path.removeprefix("."): value}


def spec_leaves(built: NamespaceSpec) -> dict[str, Any]:
    return leaves(json.loads(built.to_json()))


def model(**fields):
    return lambda e: e.config.model_config.__dict__.update(fields)


def cache(**fields):
    return lambda e: e.config.cache_config.__dict__.update(fields)


def parallel(**fields):
    return lambda e: e.config.parallel_config.__dict__.update(fields)


def draft(**fields):
    return lambda e: e.config.speculative_config.__dict__.update(fields)


def hf(**fields):
    plain = {"rope_theta": 10000.0, "hidden_size": 8}
    return lambda e: setattr(e.config.model_config.hf_config, "to_dict", lambda: plain | fields)


def load(**fields):
    return lambda e: e.config.load_config.__dict__.update(fields)


def dummy_weights(e):
    load(load_format="dummy")(e)
    model(seed=7)(e)


def rewritten(name):
    return lambda e: os.utime(e.folder / name / "model.safetensors", (1, 1))


def moved_model(e):
    shutil.copytree(e.folder / "model", e.folder / "moved", copy_function=shutil.copy2)
    model(model=str(e.folder / "moved"))(e)


def next_version(e):
    major, minor = compat.VERSION
    e.patch.setattr(compat, "VERSION", (major, minor + 1))


def group(**fields):
    """A rule that the connector does not use yet; that it separates is the server's promise."""
    return lambda e: e.after.update(groups=(dataclasses.replace(e.spec().groups[0], **fields),))


def adapter(e):
    """As the link opens a LoRA adapter's namespace."""
    e.after["facts"] = {**e.spec().facts, "adapter_sha256": "of its content"}


def transposed(e):
    """The same shape and bytes a block, tokens and channels the other way round in memory."""
    e.layers["layer.0"] = torch.zeros((8, 64, fakes.BLOCK, 1)).permute(0, 3, 2, 1)


# Field of DESIGN 3: where it stands in the spec, and an engine that differs in it.
CHANGES = {
    "model id": ("model", moved_model),
    "revision": ("facts.model.revision", model(revision="abc")),
    "files of local weights": ("facts.model.files_sha256", rewritten("model")),
    "load format": ("facts.load.format", load(load_format="safetensors")),
    "seed of dummy weights": ("facts.load.seed", dummy_weights),
    "weight dtype": ("facts.model.dtype", model(dtype="torch.bfloat16")),
    "quantisation": ("facts.model.quantization", model(quantization="fp8")),
    "KV dtype": ("facts.cache.dtype", cache(cache_dtype="fp8")),
    "rope": ("facts.model.rope.rope_theta", hf(rope_theta=5.0)),
    "overrides of the model's configuration": ("facts.model.config_sha256", hf(hidden_size=9)),
    "length that long-rope factors follow": ("facts.model.max_model_len", model(max_model_len=64)),
    "multimodal processor": ("facts.model.processor", model(mm_processor_kwargs={"size": 3})),
    "platform and kernel packing": ("facts.workers.packing", lambda e: e.isa("amx")),
    "order of the cache in memory": (
        "facts.workers.kv_cache_layout",
        lambda e: setattr(e.cache, "kv_cache_layout", "LBNHC"),
    ),
    "vLLM's major.minor": ("facts.vllm", next_version),
    "block size": ("facts.cache.block_size", cache(block_size=8)),
    "tokens of a hash": ("facts.cache.block_tokens", lambda e: setattr(e.cache, "hash_block_size", 8)),
    "bytes of a part": (
        "parts.bytes",
        lambda e: e.layers.update({"layer.0": torch.zeros((8, 2, fakes.BLOCK, 64))}),
    ),
    "strides of a part": ("parts.layout.sha256", transposed),
    "per-layer specs": ("parts.layout.sha256", lambda e: e.layer(head_size=64, num_kv_heads=1)),
    "groups": ("groups.block_tokens", group(block_tokens=8)),
    "rule of a group": ("groups.rule", group(rule="window", window_tokens=8)),
    "window of a group": ("groups.window_tokens", group(rule="window", window_tokens=12)),
    "hashes of a group": ("groups.hash_stride", group(hash_stride=2)),
    "tensor-parallel size": ("facts.parallel.tensor", parallel(tensor_parallel_size=2)),
    "pipeline-parallel size": ("facts.parallel.pipeline", parallel(pipeline_parallel_size=2)),
    "prefill-context-parallel size": ("facts.parallel.prefill_context", parallel(prefill_context_parallel_size=2)),
    "decode-context-parallel size": ("facts.parallel.decode_context", parallel(decode_context_parallel_size=2)),
    "hash algorithm": ("facts.hash.algorithm", cache(prefix_caching_hash_algo="sha256_cbor")),
    "hash length": ("facts.hash.bytes", cache(prefix_caching_hash_algo="xxhash")),
    "hash encoding": ("facts.hash.rules", lambda e: e.patch.setattr(compat, "hash_rules", lambda: "other")),
    "hash seed": ("facts.hash.seed", lambda e: e.patch.setenv("PYTHONHASHSEED", "7")),
    "method of drafts": ("facts.draft.method", draft(method="mtp")),
    "draft model": ("facts.draft.model", draft(model="elsewhere")),
    "revision of the draft model": ("facts.draft.revision", draft(revision="another")),
    "files of the draft model": ("facts.draft.files_sha256", rewritten("draft")),
    "sums (kvmp.verify)": ("facts.sums", lambda e: setattr(e, "verify", False)),
    "LoRA adapter": ("facts.adapter_sha256", adapter),
    "salt of a reset": ("salt", lambda e: e.after.update(salt="fresh")),
}
# These can only be had together with another.
TOGETHER = {
    "seed of dummy weights": {"facts.load.format"},
    "rope": {"facts.model.config_sha256"},
    "tokens of a hash": {"groups.block_tokens"},
    "hash length": {"facts.hash.algorithm", "facts.hash.seed"},
    "bytes of a part": {"parts.layout.sha256"},
    "rule of a group": {"groups.window_tokens"},
    "window of a group": {"groups.rule"},
    "draft model": {"facts.draft.files_sha256"},
}


@pytest.mark.parametrize("words", CHANGES)
def test_engines_that_differ_in_one_field_share_nothing(engine, words):
    leaf, change = CHANGES[words]
    plain = engine.spec()
    change(engine)
    other = engine.spec()
    before, after = spec_leaves(plain), spec_leaves(other)
    differing = {path for path in before | after if before.get(path) != after.get(path)}
    assert differing == {leaf} | TOGETHER.get(words, set())
    assert plain.digest() != other.digest()


def test_no_fact_is_without_its_change(engine):
    """A fact that is added to the spec fails here until an engine that differs in it stands in the table."""
    there = set(spec_leaves(engine.spec())) | {"facts.adapter_sha256"}
    assert there == {leaf for leaf, _ in CHANGES.values()}


def test_equal_engines_agree(engine):
    assert engine.spec().digest() == engine.spec().digest()


def test_an_engine_without_drafts_is_another_than_one_with(engine):
    plain = engine.spec()
    engine.config.speculative_config = None
    assert engine.spec().digest() != plain.digest()


def test_another_platform_is_another_packing(engine, monkeypatch):
    from vllm.platforms import current_platform

    plain = engine.spec()
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    flash = on_backend(engine, "FLASH_ATTN")
    assert spec_leaves(flash)["facts.workers.packing"] == "cuda:FLASH_ATTN"
    assert len({plain.digest(), flash.digest(), on_backend(engine, "FLASHINFER").digest()}) == 3


def on_backend(engine, name):
    """The spec of an engine whose attention layers run on this backend; other layers say nothing of it."""
    layer = fakes.SimpleNamespace(get_attn_backend=lambda: fakes.SimpleNamespace(get_name=lambda: name))
    layers = {"layer.0": layer, "layer.1": layer, "norm": object()}
    engine.config.compilation_config = fakes.SimpleNamespace(static_forward_context=layers)
    return engine.spec()
