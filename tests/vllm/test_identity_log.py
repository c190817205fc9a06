"""Engines that share nothing: a real server's log names the field in which they differ."""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import fakes
import pytest
from engine import until

import kvmp
from kvmp.client import Client
from kvmp.config import ConnectorConfig
from kvmp.vllm import spec
from kvmp.vllm.link import Adapter, Link
from kvmp.vllm.metadata import PartMeta


@pytest.fixture(scope="module")
def real():
    with kvmp.launch("16MiB", name=f"engine-identity-{os.getpid()}") as server:
        yield server


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"header and weights")
    return fakes.engine_config(str(tmp_path))


def built(config: Any, *, packing: str = "vec", layout: str = "1", verify: bool = False):
    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    parts = tuple(
        PartMeta(i, 4096, json.dumps({"sha256": layout}), json.dumps({"packing": [packing]})) for i in range(ranks)
    )
    return spec.build_spec(config, fakes.BLOCK, parts, verify=verify)


def nearest(server: kvmp.Server) -> str:
    """What the last line of the log says that a namespace differs in."""
    lines = [line for line in server.log().splitlines() if "shares nothing with namespace" in line]
    return lines[-1].partition("differs in ")[2] if lines else ""


def rewrite(config: Any) -> Any:
    """Other weights behind the same path."""
    with open(f"{config.model_config.model}/model.safetensors", "wb") as file:
        file.write(b"header and other weights")
    return built(config)


def changed(part: str, **fields: Any) -> Callable[[Any], Any]:
    def change(config: Any) -> Any:
        getattr(config, part).__dict__.update(fields)
        return built(config)

    return change


OTHERS = {
    "facts.model.files_sha256": rewrite,
    "facts.model.dtype": changed("model_config", dtype="torch.bfloat16"),
    "facts.model.revision": changed("model_config", revision="another"),
    "facts.cache.block_size": changed("cache_config", block_size=8),
    "facts.cache.dtype": changed("cache_config", cache_dtype="fp8"),
    "facts.hash.algorithm": changed("cache_config", prefix_caching_hash_algo="sha256_cbor"),
    "facts.parallel.decode_context": changed("parallel_config", decode_context_parallel_size=2),
    "facts.workers[0].packing[0]": lambda config: built(config, packing="amx"),
    "parts[0].layout.sha256": lambda config: built(config, layout="2"),
    "facts.sums": lambda config: built(config, verify=True),
}


@pytest.mark.parametrize("field", OTHERS)
def test_the_field_in_which_two_engines_differ_is_named(real, config, field):
    clients = [Client.connect(real.endpoint) for _ in range(2)]
    first = clients[0].open(built(config))
    second = clients[1].open(OTHERS[field](config))
    assert first.digest != second.digest
    assert first.id != second.id
    assert nearest(real).startswith(f"{field}: "), nearest(real)
    assert ";" not in nearest(real)
    for client in clients:
        client.close()


def test_a_lora_name_with_other_weights_is_another_namespace(real, config, tmp_path_factory):
    """Two engines that agree in everything, name and path of the adapter too, but not in what it contains."""
    folder, logger = tmp_path_factory.mktemp("adapter"), logging.getLogger("test")
    options = ConnectorConfig(endpoint=real.endpoint)
    links, digests = [], []
    for content in (b"one", b"two"):
        (folder / "adapter_model.safetensors").write_bytes(content)
        link = Link(options, lambda: built(config), logger, switch_off=pytest.fail)
        links.append(link)
        link.start()
        adapter = Adapter(1, "the same name", str(folder))
        until(lambda link=link, adapter=adapter: link.namespace(adapter), "the adapter's namespace")
        digests.append(link.namespace(adapter).ref.digest)
        assert nearest(real).startswith("facts.adapter_sha256: ")
    assert len({*digests, links[0].namespace().ref.digest}) == 3
    assert links[0].namespace().ref.digest == links[1].namespace().ref.digest
    for link in links:
        link.stop()
