"""Aborts and deaths while a copy is part done, held there: nothing wrong is read afterwards, nothing stays behind.

Every test first sees that a block of the copy has passed the gate, and that another has not.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import kvmp
from demo.engine import Engine, Pending
from tests.engines.conftest import StartEngine
from tests.engines.gate import Gate
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    forget,
    random_prompt,
    stats,
    until,
)
from tests.engines.successors import Successors
from tests.stopping import stopped

BLOCKS = 10
TOKENS = BLOCKS * BLOCK + 5
CYCLE = 8  # prompts of so many tokens that take every slot of the arena anew


@dataclass
class Scene:
    successors: Successors
    server: kvmp.Server
    held: Engine
    """Its copies stop at the gate."""
    free: Engine
    """Its copies do not."""
    gate: Gate

    def restart_server(self) -> None:
        self.server.kill()
        self.server.close()
        self.server = self.successors.start()
        until(lambda: stats(self.server)["engines"] == 2, "both engines attached to the new server")

    def begin_store(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Pending:
        """A request whose prompt's store is part done."""
        self.gate.hold()
        pending = self.held.submit(prompt, new_tokens)
        until(lambda: self.gate.passed("store"), "a block stored")
        assert self.gate.passed("store") < BLOCKS
        assert stats(self.server)["blocks_writing"] == BLOCKS
        return pending

    def begin_load(self, prompt: list[int]) -> Pending:
        """A request whose prompt is in kvmp, its load part done."""
        self.store_whole(prompt)
        self.gate.hold()
        pending = self.held.submit(prompt, NEW_TOKENS)
        until(lambda: self.gate.passed("load"), "a block loaded")
        assert self.gate.passed("load") < BLOCKS
        assert not pending.done()
        return pending

    def store_whole(self, prompt: list[int]) -> None:
        before = stats(self.server)["committed_blocks"]
        self.held.generate([prompt], 1)
        until(lambda: stats(self.server)["committed_blocks"] >= before + BLOCKS, "the prompt stored")
        forget(self.held)

    def cycle_arena(self, reference: Reference) -> None:
        """Have the other engine fill every slot with other KV, all of it right."""
        before = stats(self.server)["evictions"]
        self.answer_cycle(reference)
        assert stats(self.server)["evictions"] > before

    def answer_cycle(self, reference: Reference, last: int = CYCLE) -> int:
        """The last prompts of a cycle, rightly answered; how many of their tokens were found."""
        found = 0
        for number in range(CYCLE - last, CYCLE):
            prompt = random_prompt(f"cycle {number}", TOKENS)
            (output,) = self.free.generate([prompt], NEW_TOKENS)
            assert output.tokens == reference.tokens(prompt)
            found += output.cached_tokens
            forget(self.free)
        return found

    def assert_right(self, prompt: list[int], reference: Reference) -> None:
        """Both engines answer rightly, whatever kvmp has for them by now."""
        self._found(prompt, reference)

    def assert_found(self, prompt: list[int], reference: Reference) -> None:
        """Both engines answer rightly from what kvmp has, which is all of it."""
        assert self._found(prompt, reference) == [BLOCKS * BLOCK] * 2

    def _found(self, prompt: list[int], reference: Reference) -> list[int]:
        found = []
        for engine in (self.held, self.free):
            forget(engine)
            (output,) = engine.generate([prompt], NEW_TOKENS)
            assert output.tokens == reference.tokens(prompt)
            found.append(output.cached_tokens)
        return found

    def open_slots(self) -> int:
        """Slots that somebody may still be writing to."""
        now = stats(self.server)
        return now["blocks_writing"] + now["blocks_quarantined"]

    def assert_nothing_open(self) -> None:
        def closed() -> bool:
            now = stats(self.server)
            return not any(now[key] for key in ("blocks_writing", "blocks_quarantined", "read_leases", "write_leases"))

        until(closed, "every lease ended and every slot ready or free")


@pytest.fixture(scope="module")
def scene(start_engine: StartEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    gate, successors = Gate(folder), Successors("part-done", folder)
    first = successors.start()
    held = start_engine(endpoint=first.endpoint, connector_module="tests.engines.held_copies", env=gate.environment)
    free = start_engine(endpoint=first.endpoint)
    scene = Scene(successors, first, held.wait_up(), free.wait_up(), gate)
    yield scene
    gate.open()
    successors.end(scene.server)


@pytest.fixture(autouse=True)
def _open_gate(scene: Scene) -> Iterator[None]:
    yield
    scene.gate.open()


def test_abort_in_mid_load(scene: Scene, reference: Reference) -> None:
    prompt = random_prompt("abort in mid-load", TOKENS)
    pending = scene.begin_load(prompt)
    scene.held.abort(pending)
    scene.gate.open()
    assert pending.result().finish == "abort"
    scene.assert_found(prompt, reference)
    scene.assert_nothing_open()


def test_abort_in_mid_store(scene: Scene, reference: Reference) -> None:
    prompt = random_prompt("abort in mid-store", TOKENS)
    pending = scene.begin_store(prompt, new_tokens=4_000)
    scene.held.abort(pending)
    assert pending.result().finish == "abort"
    assert scene.gate.passed("store") < BLOCKS
    scene.gate.open()
    scene.assert_nothing_open()
    scene.assert_found(prompt, reference)  # the store went on: its blocks were pinned


def test_server_killed_in_mid_load(scene: Scene, reference: Reference) -> None:
    """The new server knows nothing of the lease, and grants the leased slots again while they are read."""
    prompt = random_prompt("server killed in mid-load", TOKENS)
    pending = scene.begin_load(prompt)
    failed = scene.held.counters().get("kvmp_failed_load_blocks", 0)
    scene.restart_server()
    scene.cycle_arena(reference)
    scene.gate.open()
    assert pending.result().tokens == reference.tokens(prompt)
    assert scene.held.counters()["kvmp_failed_load_blocks"] > failed
    scene.assert_right(prompt, reference)
    scene.assert_nothing_open()


def test_server_killed_in_mid_store(scene: Scene, reference: Reference) -> None:
    """The new server leaves the slots alone that are still written to, until the writer has let go."""
    prompt = random_prompt("server killed in mid-store", TOKENS)
    pending = scene.begin_store(prompt)
    scene.restart_server()
    assert stats(scene.server)["blocks_quarantined"] == BLOCKS
    scene.cycle_arena(reference)
    assert scene.gate.passed("store") < BLOCKS
    scene.gate.open()
    assert pending.result().tokens == reference.tokens(prompt)
    scene.assert_nothing_open()
    scene.assert_right(prompt, reference)


def test_worker_stopped_in_mid_store_over_a_restart(scene: Scene, reference: Reference) -> None:
    """Longer than every bound of a call: its slots stay its own, the other goes on, and its bytes land nowhere else."""
    prompt = random_prompt("worker stopped", TOKENS)
    pending = scene.begin_store(prompt)
    with stopped(scene.held.process_named("VLLM::Worker").pid):
        scene.restart_server()
        assert scene.open_slots() == BLOCKS
        scene.cycle_arena(reference)
        assert scene.open_slots() == BLOCKS
    assert scene.gate.passed("store") < BLOCKS
    scene.gate.open()
    assert pending.result().tokens == reference.tokens(prompt)
    assert scene.answer_cycle(reference, last=2) > 0
    scene.assert_nothing_open()
    scene.assert_right(prompt, reference)


def test_scheduler_killed_while_its_worker_copies(scene: Scene, reference: Reference) -> None:
    """The last test of the scene: its engine dies. Slots that its frozen worker may write to are not granted."""
    prompt = random_prompt("scheduler killed", TOKENS)
    scene.begin_store(prompt)
    worker = scene.held.process_named("VLLM::Worker")
    worker.signal(signal.SIGSTOP)
    sessions = stats(scene.server)["sessions"]
    scene.held.process_named("VLLM::EngineCore").signal(signal.SIGKILL)
    until(lambda: stats(scene.server)["sessions"] < sessions, "the scheduler's session ended")
    assert scene.open_slots() == BLOCKS
    scene.cycle_arena(reference)
    assert scene.open_slots() == BLOCKS
    scene.held.kill()
    assert scene.gate.passed("store") < BLOCKS
    scene.assert_nothing_open()
    (output,) = scene.free.generate([prompt], NEW_TOKENS)
    assert output.tokens == reference.tokens(prompt)
