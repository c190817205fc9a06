"""The counters as vLLM's front end shows them: through vLLM's own classes, into a registry of this test's."""

import fakes
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from kvmp.vllm.connector import KvmpConnector
from kvmp.vllm.stats import COUNTERS, GAUGES, MAXIMA

LABELS = ["model_name", "engine"]


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry, tmp_path):
    """Of a front end with two engines."""

    def into(kind):
        return lambda **kwargs: kind(**kwargs, registry=registry)

    types = {kind: into(kind) for kind in (Gauge, Counter, Histogram)}
    values = {0: ["m", "0"], 1: ["m", "1"]}
    return KvmpConnector.build_prom_metrics(fakes.engine_config(str(tmp_path)), types, LABELS, values)


def shown(registry, name, engine="0"):
    return registry.get_sample_value(name, {"model_name": "m", "engine": engine})


def test_sums_add_up_and_the_last_and_the_largest_stay(metrics, registry):
    metrics.observe({"stored_blocks": 3, "attached": 1, "longest_call_us": 70})
    metrics.observe({"stored_blocks": 4, "attached": 0, "longest_call_us": 20})
    metrics.observe({"stored_blocks": 5}, 1)
    assert shown(registry, "vllm:kvmp_stored_blocks_total") == 7
    assert shown(registry, "vllm:kvmp_stored_blocks_total", "1") == 5
    assert shown(registry, "vllm:kvmp_attached") == 0
    assert shown(registry, "vllm:kvmp_longest_call_us") == 70


def test_every_counter_is_there(metrics, registry):
    names = {f"vllm:kvmp_{name}" + ("" if name in GAUGES | MAXIMA else "_total") for name in COUNTERS}
    assert all(shown(registry, name) == 0 for name in names)


@pytest.mark.parametrize("rubbish", [{"stored_blocks": "x"}, {"stored_blocks": -1}, {"attached": {}}, None])
def test_what_cannot_be_counted_ends_the_counting_and_nothing_else(metrics, registry, caplog, rubbish):
    metrics.observe({"stored_blocks": 3, "of a later release": 1})
    metrics.observe(rubbish)
    metrics.observe({"stored_blocks": 3})
    assert shown(registry, "vllm:kvmp_stored_blocks_total") == 3


def test_a_second_front_end_in_the_process_can_have_its_own(tmp_path):
    """vLLM takes its own metrics out of the registry before it makes new ones: it knows them by their prefix."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    types = {kind: kind for kind in (Gauge, Counter, Histogram)}
    for _ in range(2):
        unregister_vllm_metrics()
        KvmpConnector.build_prom_metrics(fakes.engine_config(str(tmp_path)), types, LABELS, {0: ["m", "0"]})
        assert shown(REGISTRY, "vllm:kvmp_stored_blocks_total") == 0
    unregister_vllm_metrics()
