"""Two engines on one server at once."""

from collections.abc import Iterator

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
    stats,
    until,
)

PATIENT = {"kvmp.timeout_ms": 5000}
"""What is shown here is what is answered, not how fast: a bound missed on a busy machine costs a hit."""
LASTING = random_prompt("stored before all else", 500)

Pair = tuple[kvmp.Server, Engine, Engine]


@pytest.fixture(scope="module")
def pair(start_engine: StartEngine) -> Iterator[Pair]:
    with kvmp.launch("256MiB") as server:
        engines = [start_engine(endpoint=server.endpoint, connector_config=PATIENT) for _ in range(2)]
        one, other = engines[0].wait_up(), engines[1].wait_up()
        one.generate([LASTING], 1)
        await_blocks(server, 500 // BLOCK)
        yield server, one, other


def test_each_finds_what_the_other_stored(pair: Pair, reference: Reference) -> None:
    server, one, other = pair
    prompts = {one: random_prompt("of one", 300), other: random_prompt("of the other", 300)}
    for engine, prompt in prompts.items():
        engine.generate([prompt], 1)
    await_blocks(server, 500 // BLOCK + 2 * (300 // BLOCK))
    for engine, prompt in ((one, prompts[other]), (other, prompts[one])):
        before = loaded_tokens(engine)
        (output,) = engine.generate([prompt], NEW_TOKENS)
        assert output.tokens == reference.tokens(prompt)
        assert loaded_tokens(engine) - before == 300 // BLOCK * BLOCK


def test_both_at_the_same_prompts_at_the_same_time(pair: Pair, reference: Reference) -> None:
    """Whoever reserves a block first writes it; the other is told so, computes it too, and both are right."""
    server, one, other = pair
    prompts = [random_prompt(f"together {number}", 200 + 17 * number) for number in range(6)]
    found = []
    for _ in range(3):
        before = {engine: loaded_tokens(engine) for engine in (one, other)}
        pending = [(engine.submit(prompt, NEW_TOKENS), prompt) for prompt in prompts for engine in (one, other)]
        for request, prompt in pending:
            assert request.result().tokens == reference.tokens(prompt)
        for engine in (one, other):
            forget(engine)
        found.append([loaded_tokens(engine) - before[engine] for engine in (one, other)])
    # From the second round on all that is full is there, stored by one or by the other.
    assert found[1:] == [[sum(len(prompt) // BLOCK * BLOCK for prompt in prompts)] * 2] * 2
    assert stats(server)["protocol_errors"] == 0


def test_a_reset_engine_finds_nothing_of_before_and_others_do(pair: Pair, reference: Reference) -> None:
    server, one, other = pair
    namespaces = stats(server)["namespaces"]
    until(lambda: one.reset(connector=True), "the first engine reset, nothing pinned any more")
    until(lambda: stats(server)["namespaces"] > namespaces, "its fresh namespace open")
    forget(other)
    before = {engine: loaded_tokens(engine) for engine in (one, other)}
    ready = stats(server)["blocks_ready"]
    (output,) = one.generate([LASTING], NEW_TOKENS)
    assert output.cached_tokens == 0
    assert output.tokens == reference.tokens(LASTING)
    # It goes on storing, where nobody else looks.
    await_blocks(server, ready + 500 // BLOCK)
    (output,) = other.generate([LASTING], NEW_TOKENS)
    assert output.tokens == reference.tokens(LASTING)
    assert loaded_tokens(other) - before[other] == 500 // BLOCK * BLOCK
    forget(one)
    (output,) = one.generate([LASTING], NEW_TOKENS)
    assert output.tokens == reference.tokens(LASTING)
    assert loaded_tokens(one) - before[one] == 500 // BLOCK * BLOCK


def test_an_engine_that_is_killed_costs_the_other_nothing(pair: Pair, reference: Reference) -> None:
    """What it stored stays, also what it stored before it was reset."""
    _server, one, other = pair
    forget(other)
    pending = one.submit(random_prompt("cut off", 2_000), 500)
    one.kill()
    assert pending.done()
    (output,) = other.generate([LASTING], NEW_TOKENS)
    assert output.tokens == reference.tokens(LASTING)
    assert output.cached_tokens == 500 // BLOCK * BLOCK
