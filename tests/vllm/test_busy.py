"""No room for one more request: asked again later, and no reason to take the server for lost."""

import fakes
from engine import PROMPT, stored

TABLE = [1, 2, 3, 4, 5]


def test_a_lookup_without_room_is_sent_when_vllm_asks_again(make, server):
    stored(make())
    engine = make()
    req = fakes.request("again", PROMPT)
    server.busy = {"lookup"}
    engine.scheduler.on_new_request(req)
    assert engine.scheduler.get_num_new_matched_tokens(req, 0) == (None, False)
    assert engine.scheduler.get_num_new_matched_tokens(req, 0) == (None, False)
    assert engine.side._link.up
    assert engine.count("busy") == 3
    server.busy = set()
    assert engine.ask(req) == (16, True)
    assert engine.count("errors") == 0


def test_a_lookup_that_never_finds_room_is_a_miss_after_the_bound(make, server):
    engine = make(extra={"kvmp.timeout_ms": 20})
    server.busy = {"lookup"}
    req = fakes.request("r", PROMPT)
    engine.scheduler.on_new_request(req)
    assert engine.ask(req) == (0, False)
    assert engine.count("lookup_timeouts") == 1
    assert engine.side._link.up
    # Of other requests it says nothing.
    server.busy = set()
    stored(engine, "other", tokens=PROMPT[2:])
    assert len(server.blocks) == 4


def test_each_ask_has_its_own_bound(make, server):
    engine = make()
    now = [0.0]
    engine.side._lookups._clock = lambda: now[0]
    req = stored(engine)
    now[0] = 1000.0
    server.busy = {"lookup"}
    assert engine.scheduler.get_num_new_matched_tokens(req, 0) == (None, False)
    server.busy = set()
    assert engine.ask(req) == (16, True)


def test_blocks_put_up_without_room_are_put_up_with_the_next_step(make, server):
    engine = make()
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    server.busy = {"reserve"}
    engine.prefill(req, TABLE)
    assert engine.pool.pinned == 0
    assert not engine.scheduler.has_pending_push_work()
    assert engine.side._link.up
    server.busy = set()
    engine.run_step(fakes.step({"r": TABLE}, cached=[("r", 18, 1)]))
    engine.drain()
    assert len(server.blocks) == 4
    assert engine.count("errors") == 0
