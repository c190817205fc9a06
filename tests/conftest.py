"""What every Python test shares: the run leaves nothing of kvmp's behind, and GPU tests need a GPU."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not _has_cuda():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Segments, descriptors and threads of kvmp's own that outlive the tests fail the run."""
    before = _segments()
    yield
    gc.collect()
    left = {"segments": _segments() - before, "descriptors": _descriptors(), "threads": _threads()}
    assert not any(left.values()), f"left behind by the tests: {left}"


def _segments() -> set[str]:
    return {str(path) for path in Path("/dev/shm").glob("*.kvmp*")}


def _descriptors() -> set[str]:
    return {target for target in _link_targets("/proc/self/fd") if ".kvmp" in target or "memfd:kvmp" in target}


def _link_targets(folder: str) -> Iterator[str]:
    for name in os.listdir(folder):
        try:
            yield os.readlink(f"{folder}/{name}")
        except FileNotFoundError:  # the descriptor that listed the folder
            continue


def _threads() -> set[str]:
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return {name for name in names if name.startswith("kvmp")}
