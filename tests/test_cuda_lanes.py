"""Copies between a GPU and the arena, with a driver that stands for one: who waits for what, what is let go of when."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_gpu import driver, scenes

ROOT = Path(__file__).parent.parent
_WATCHDOG_S = 60.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver.build(tmp_path_factory.mktemp("driver"))


def play(scene: Callable[[driver.Driver], None], library: Path) -> None:
    """In a process of its own: a driver is loaded once, and a scene that keeps the GIL for ever must be ended."""
    command = [sys.executable, "-m", "tests.fake_gpu.scenes", scene.__name__, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_WATCHDOG_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "scene",
    [
        scenes.what_is_moved,
        scenes.what_a_description_of_tensors_makes_of_it,
        scenes.an_arena_that_is_let_go_of_is_unmapped,
        scenes.another_arena_is_registered_at_once,
        scenes.the_last_copy_of_an_arena_unregisters_elsewhere,
        scenes.the_gil_is_free_while_the_driver_is_busy,
        scenes.copies_that_have_ended_cost_no_call,
        scenes.a_failure_is_seen_by_every_copy,
    ],
    ids=lambda scene: scene.__name__,
)
def test_with_a_driver(scene: Callable[[driver.Driver], None], library: Path) -> None:
    play(scene, library)


def test_with_a_driver_before_12_8(tmp_path: Path) -> None:
    play(scenes.an_old_driver_has_no_batches, driver.build(tmp_path, "-DBEFORE_12_8"))
