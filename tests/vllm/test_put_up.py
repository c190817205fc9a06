"""What is put up for storing: as much as may be pinned, and only what is known to hold its KV."""

import fakes
import pytest
from engine import PROMPT

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
    assert Pins().room == 0


def test_three_quarters_of_the_blocks_may_be_pinned(pins):
    assert pins.room == 75
    pins.pin(range(1, 61))
    assert pins.room == 15
    pins.pin(range(1, 11))  # By another request too.
    assert pins.room == 15
    pins.pin(range(61, 91))
    assert pins.room == 0
    pins.unpin(range(1, 31))
    assert pins.room == 5


def test_a_long_prompt_is_put_up_whole_though_its_chunks_wait_for_their_end(make, server):
    """Of a cache of 100 blocks a prompt takes 70 in two steps, and no store ends in between."""
    engine = make()
    tokens = [7 * token for token in range(70 * fakes.BLOCK)]
    request, table = fakes.request("long", tokens), list(range(1, 71))
    engine.ask(request)
    half = len(tokens) // 2
    first = engine.scheduler.build_connector_meta(fakes.step({"long": table}, new=[("long", 0, half)]))
    second = engine.scheduler.build_connector_meta(fakes.step({"long": table}, cached=[("long", half, half)]))
    third = engine.scheduler.build_connector_meta(fakes.step({}))
    stores = [job.block_ids.tolist() for meta in (first, second, third) for job in meta.stores]
    assert stores == [table[:35], table[35:]]


def test_blocks_that_another_connector_loads_in_this_step_are_put_up_in_the_next(make, server):
    """Under a MultiConnector: should that load fail, the blocks hold no KV until they are computed."""
    engine = make()
    request, table = fakes.request("r", PROMPT), [1, 2, 3, 4, 5]
    engine.ask(request)
    loading = fakes.step({"r": table}, new=[("r", 16, 2)])
    loading.has_sync_kv_loads = True
    engine.scheduler.build_connector_meta(loading)
    assert engine.pool.pinned == 0
    engine.scheduler.build_connector_meta(fakes.step({"r": table}, cached=[("r", 18, 1)]))
    assert engine.pool.pinned == 4


@pytest.mark.parametrize("batches", [2, 3])
def test_with_batches_under_way_such_blocks_wait_for_the_output_of_their_step(make, server, batches):
    """Also those of a request that is admitted meanwhile, as it may have found them in the engine's cache."""
    engine = make(batches=batches)
    tables = {"running": [1, 2, 3, 4, 5], "loads": [6, 7, 8, 9, 10], "finds": [6, 7, 8, 9, 11]}
    for req_id, table in tables.items():
        engine.ask(fakes.request(req_id, [token + table[-1] for token in PROMPT]))

    def put_up(new=(), cached=(), *, sync=False):
        step = fakes.step(tables, new=new, cached=cached)
        step.has_sync_kv_loads = sync
        before = engine.pool.pinned
        engine.scheduler.build_connector_meta(step)
        return engine.pool.pinned - before

    assert put_up(new=[("running", 0, 8)]) == 2
    # Who ran before goes on, whatever is loaded beside it.
    assert put_up(new=[("loads", 16, 2)], cached=[("running", 8, 8)], sync=True) == 2
    assert put_up(new=[("finds", 16, 2)], cached=[("loads", 18, 1)]) == 0
    for _ in range(batches - 2):
        assert put_up(cached=[("loads", 18, 1), ("finds", 18, 1)]) == 0
    assert put_up(cached=[("loads", 18, 1), ("finds", 18, 1)]) == 4
    assert put_up(cached=[("loads", 18, 1), ("finds", 18, 1)]) == 4


def test_blocks_that_turn_out_to_hold_no_kv_are_not_stored(make, server):
    engine = make()
    for req_id, table in (("bad", [1, 2, 3, 4, 5]), ("good", [6, 7, 8, 9, 10])):
        request = fakes.request(req_id, [token + table[0] for token in PROMPT])
        engine.ask(request)
        engine.scheduler.build_connector_meta(fakes.step({req_id: table}, new=[(req_id, 0, 18)]))
        if req_id == "bad":
            engine.scheduler.update_connector_output(fakes.output(invalid={3, 77}))
            assert engine.pool.pinned == 0
    engine.drain()
    assert len(server.blocks) == 4
    assert engine.pool.pinned == 0
