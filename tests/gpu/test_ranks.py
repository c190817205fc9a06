"""A real vLLM on two GPUs: each rank loads, byte for byte, what it computed, whoever stored it.

One engine a test, which starts in 45 to 110 s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.gpu import models  # noqa: E402
from tests.gpu.loading import TEST_S, check_bytes, check_found, check_kind, load_again  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(TEST_S),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here"),
]


def test_each_rank_loads_the_part_that_it_computed(tmp_path: Path) -> None:
    result = load_again(tmp_path, models.two_kv_heads(tmp_path), ranks=2)
    check_kind(result)
    assert len({facts["device"] for facts in result["facts"]}) == 2
    assert result["parts"] == 2
    assert result["stored_parts"] == 2 * result["stored_blocks"] > 0
    assert result["as_on_rank_0"][1] == 0, "ranks that are alike would let a part of the other one pass"
    check_found(result)
    check_bytes(result)


@pytest.mark.parametrize("model", [models.one_kv_head, models.latent], ids=lambda model: model.__name__)
def test_ranks_of_equal_kv_both_load_what_one_of_them_stored(model: Callable, tmp_path: Path) -> None:
    result = load_again(tmp_path, model(tmp_path), ranks=2)
    check_kind(result)
    assert len({facts["device"] for facts in result["facts"]}) == 2
    assert result["parts"] == 1
    assert result["stored_parts"] == result["stored_blocks"] > 0
    # What lets them share: the other rank gets what the first one stored.
    assert result["as_on_rank_0"][1] == result["ranks"][1]["computed"], "the ranks' KV is not equal"
    check_found(result)
    check_bytes(result)
