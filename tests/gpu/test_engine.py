"""A real vLLM on one GPU, as it is by default there: blocks loaded are, byte for byte, as computed.

One engine a test, which starts in 45 to 110 s.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.gpu import models  # noqa: E402
from tests.gpu.loading import TEST_S, check_bytes, check_found, check_kind, load_again  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(TEST_S),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here"),
]


@pytest.mark.parametrize("layout", [None, "LBNHC"])
def test_what_is_loaded_is_what_was_computed(layout: str | None, tmp_path: Path) -> None:
    result = load_again(tmp_path, models.llama(tmp_path), layout=layout)
    check_kind(result)
    check_found(result)
    check_bytes(result)


def test_what_is_loaded_of_a_latent_cache_is_what_was_computed(tmp_path: Path) -> None:
    result = load_again(tmp_path, models.latent(tmp_path))
    assert all("MLA" in backend for facts in result["facts"] for backend in facts["backends"])
    check_kind(result)
    check_found(result)
    check_bytes(result)
