"""Engine 1 stores and is killed in a load; engine 2 finds its KV and answers as an engine without kvmp does."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

import kvmp
from demo.engine import Engine
from tests.engines.conftest import StartEngine
from tests.engines.gate import Gate
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    await_backing,
    await_blocks,
    forget,
    loaded_tokens,
    random_prompt,
    spoil,
    stats,
    until,
)
from tests.stopping import stands_still, stop

LENGTHS = [1, 31, 32, 33, *range(2 * BLOCK - 2, 2 * BLOCK + 3), 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1]
LONG = random_prompt("long", 2_000)
TALKER = random_prompt("decode", BLOCK + 5)
TALK_TOKENS = 3 * BLOCK


WITH_KV = [*(length + NEW_TOKENS - 1 for length in [*LENGTHS, len(LONG)]), len(TALKER) + TALK_TOKENS - 1]
PATIENT = {"kvmp.timeout_ms": 5000}
"""What is shown here is what is answered, not how fast: a bound missed on a busy machine costs a hit."""
PINS_GONE_S = 20.0
"""A third of the time after which the server lets go of any pin by itself."""


@dataclass(frozen=True)
class Stored:
    server: kvmp.Server
    engine: Engine
    """Engine 1; its copies stop at the gate."""
    gate: Gate
    talk: list[int]
    """What it answered to TALKER."""


@dataclass(frozen=True)
class Restarted:
    server: kvmp.Server
    engine: Engine
    """Engine 2."""
    talk: list[int]


@pytest.fixture(scope="module")
def stored(start_engine: StartEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    gate = Gate(tmp_path_factory.mktemp("gate"))
    with kvmp.launch("256MiB") as server:
        engine = start_engine(
            endpoint=server.endpoint,
            connector_module="tests.engines.held_copies",
            connector_config=PATIENT,
            env=gate.environment,
        ).wait_up()
        until(lambda: stats(server)["engines"], "attached")
        await_backing(server)
        engine.generate([random_prompt(length, length) for length in LENGTHS], NEW_TOKENS)
        engine.generate([LONG], NEW_TOKENS)
        (talk,) = engine.generate([TALKER], TALK_TOKENS)
        await_blocks(server, sum(tokens // BLOCK for tokens in WITH_KV))
        yield Stored(server, engine, gate, talk.tokens)


@pytest.fixture(scope="module")
def restarted(start_engine: StartEngine, stored: Stored) -> Restarted:
    stored.engine.kill()
    engine = start_engine(endpoint=stored.server.endpoint, connector_config=PATIENT).wait_up()
    until(lambda: stats(stored.server)["engines"], "attached")
    return Restarted(stored.server, engine, stored.talk)


def test_killed_in_mid_load_its_pins_go_at_once(stored: Stored) -> None:
    """Also while its worker lives; all that it was loading is found by engine 2, in the tests below."""
    server, engine, gate = stored.server, stored.engine, stored.gate
    forget(engine)
    gate.hold()
    engine.submit(LONG, NEW_TOKENS)
    until(lambda: gate.passed("load"), "a block loaded")
    before = stats(server)
    assert [before[key] for key in ("read_leases", "pins")] == [1, 1]  # the path's tip
    worker = engine.process_named("VLLM::Worker")
    stop(worker.pid)
    engine.process_named("VLLM::EngineCore").signal(signal.SIGKILL)
    until(lambda: not any(stats(server)[key] for key in ("read_leases", "pins")), "its pins gone", PINS_GONE_S)
    assert stats(server)["sessions"] == before["sessions"] - 1
    assert stands_still(worker.pid)
    engine.kill()
    assert gate.passed("load") < len(LONG) // BLOCK
    until(lambda: not stats(server)["engines"], "all of it gone")
    now = stats(server)
    assert [now[key] for key in ("blocks_writing", "blocks_quarantined", "evictions")] == [0, 0, 0]
    assert now["blocks_ready"] == before["blocks_ready"]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_round_a_block_boundary(restarted: Restarted, reference: Reference, length: int) -> None:
    prompt = random_prompt(length, length)
    before = loaded_tokens(restarted.engine)
    (output,) = restarted.engine.generate([prompt], NEW_TOKENS)
    assert output.tokens == reference.tokens(prompt)
    full = length // BLOCK * BLOCK
    assert loaded_tokens(restarted.engine) - before == full
    assert output.cached_tokens == full


def test_a_long_prompt_is_found_whole(restarted: Restarted, reference: Reference) -> None:
    before = loaded_tokens(restarted.engine)
    (output,) = restarted.engine.generate([LONG], NEW_TOKENS)
    assert loaded_tokens(restarted.engine) - before == output.cached_tokens == len(LONG) // BLOCK * BLOCK
    assert output.tokens == reference.tokens(LONG)


def test_a_prompt_that_parts_midway_is_found_up_to_there(restarted: Restarted, reference: Reference) -> None:
    forget(restarted.engine)
    prompt = LONG[: 10 * BLOCK + 7] + random_prompt("another end", 100)
    (output,) = restarted.engine.generate([prompt], NEW_TOKENS)
    assert output.cached_tokens == 10 * BLOCK
    assert output.tokens == reference.tokens(prompt)


def test_generated_tokens_are_found_too(restarted: Restarted, reference: Reference) -> None:
    prompt = [*TALKER, *restarted.talk]
    (output,) = restarted.engine.generate([prompt], NEW_TOKENS)
    assert output.cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK > len(TALKER)
    assert output.tokens == reference.tokens(prompt)


def test_another_salt_finds_nothing(restarted: Restarted, reference: Reference) -> None:
    forget(restarted.engine)
    output = restarted.engine.submit(LONG, NEW_TOKENS, salt="of another user").result()
    assert output.cached_tokens == 0
    assert output.tokens == reference.tokens(LONG)


def test_bytes_overwritten_in_the_arena_change_the_tokens(restarted: Restarted, reference: Reference) -> None:
    """The negative control of every comparison here: tokens do depend on the KV that kvmp brings."""
    prompt = random_prompt("to be spoilt", 4 * BLOCK + 1)
    before = np.fromfile(restarted.server.segment_path, np.uint8)
    ready = stats(restarted.server)["blocks_ready"]
    restarted.engine.generate([prompt], 1)
    await_blocks(restarted.server, ready + 4)
    spoil(restarted.server.segment_path, before)
    forget(restarted.engine)
    (output,) = restarted.engine.generate([prompt], NEW_TOKENS)
    assert output.cached_tokens == 4 * BLOCK
    assert output.tokens != reference.tokens(prompt)
