"""Engine 1 stores and is killed; engine 2 finds its KV and answers as an engine without kvmp does."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

import kvmp
from demo.engine import Engine
from tests.engines.conftest import StartEngine
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    await_blocks,
    forget,
    loaded_tokens,
    random_prompt,
    spoil,
    stats,
)

LENGTHS = [1, 31, 32, 33, *range(2 * BLOCK - 2, 2 * BLOCK + 3), 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1]
LONG = random_prompt("long", 2_000)
TALKER = random_prompt("decode", BLOCK + 5)
TALK_TOKENS = 3 * BLOCK


@dataclass(frozen=True)
class Restarted:
    server: kvmp.Server
    engine: Engine
    """Engine 2."""
    talk: list[int]
    """What engine 1 answered to TALKER."""


@pytest.fixture(scope="module")
def restarted(start_engine: StartEngine) -> Iterator[Restarted]:
    with kvmp.launch("256MiB") as server:
        first = start_engine(endpoint=server.endpoint).wait_up()
        first.generate([random_prompt(length, length) for length in LENGTHS], NEW_TOKENS)
        first.generate([LONG], NEW_TOKENS)
        (talk,) = first.generate([TALKER], TALK_TOKENS)
        await_blocks(
            server, sum(length // BLOCK for length in [*LENGTHS, len(LONG), len(TALKER) + TALK_TOKENS - BLOCK])
        )
        first.kill()
        yield Restarted(server, start_engine(endpoint=server.endpoint).wait_up(), talk.tokens)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_round_a_block_boundary(restarted: Restarted, reference: Reference, length: int) -> None:
    prompt = random_prompt(length, length)
    before = loaded_tokens(restarted.engine)
    (output,) = restarted.engine.generate([prompt], NEW_TOKENS)
    assert output.tokens == reference.tokens(prompt)
    least = (length - 1) // BLOCK * BLOCK  # a prompt that ends with its block may have its last token computed
    assert least <= output.cached_tokens <= length
    assert loaded_tokens(restarted.engine) - before >= least


def test_a_long_prompt_is_found_whole(restarted: Restarted, reference: Reference) -> None:
    (output,) = restarted.engine.generate([LONG], NEW_TOKENS)
    assert output.cached_tokens >= (len(LONG) - 1) // BLOCK * BLOCK
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
    assert output.cached_tokens >= (len(prompt) // BLOCK - 1) * BLOCK > len(TALKER)
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
