"""What pins of ours may keep from an engine."""

import fakes
import pytest

from kvmp.vllm.pins import Pins


@pytest.fixture
def pool():
    return fakes.FakePool(100)


@pytest.fixture
def pins(pool):
    pins = Pins()
    pins.bind(pool)
    return pins


def test_no_pool_no_room():
    assert Pins().room(5) == 0


def test_half_of_the_blocks_may_be_kept_from_the_engine(pins):
    assert pins.room(200) == 50
    pins.pin(range(1, 41))
    assert (pins.room(4), pins.room(30)) == (4, 10)
    pins.pin(range(41, 61))
    assert pins.room(1) == 0
    pins.unpin(range(1, 31))
    assert pins.room(100) == 20


def test_more_of_them_while_their_request_runs(pins, pool):
    """As the chunks of one long prompt, in a cache that is not much larger."""
    running = [pool.blocks[block] for block in range(1, 91)]
    pool.touch(running)
    pins.pin(range(1, 61))
    assert (pins.room(10), pins.room(30)) == (10, 15)
    pool.free_blocks(running)
    assert pins.room(30) == 0


def test_a_long_prompt_is_put_up_whole_though_its_chunks_wait_for_their_end(make, server):
    """Of a cache of 100 blocks a prompt takes 70 in two steps, and no store ends in between."""
    engine = make()
    tokens = [7 * token for token in range(70 * fakes.BLOCK)]
    request, table = fakes.request("long", tokens), list(range(1, 71))
    pool = engine.pool
    pool.touch([pool.blocks[block] for block in table])
    engine.ask(request)
    half = len(tokens) // 2
    first = engine.scheduler.build_connector_meta(fakes.step({"long": table}, new=[("long", 0, half)]))
    second = engine.scheduler.build_connector_meta(fakes.step({"long": table}, cached=[("long", half, half)]))
    third = engine.scheduler.build_connector_meta(fakes.step({}))
    stores = [job.block_ids.tolist() for meta in (first, second, third) for job in meta.stores]
    assert stores == [table[:35], table[35:]]
