"""Copies on a device end later: until then nothing is said of their jobs, and then all of it once."""

from collections import Counter

import fakes
import pytest
from engine import PROMPT, until
from fake_device import LOAD, STORE
from flying import BLOCKS, TOKENS

from kvmp import errors


@pytest.mark.parametrize("void", [False, True])
def test_a_store_is_closed_and_its_blocks_let_go_only_after_its_copy_has_ended(flying, gpu, server, void):
    flying.put_up(0)
    flying.put_up(1)
    if void:
        flying.engine.scheduler.reset_cache()
    flying.look()
    assert (len(server.blocks), server.aborted, flying.pinned) == (BLOCKS, 0, 2 * BLOCKS)
    gpu.end(STORE)
    until(lambda: (flying.step(), flying.pinned == BLOCKS)[1], "the first one reported")
    gpu.end(STORE)
    flying.settle()
    closed = (BLOCKS, 2 * BLOCKS) if void else (3 * BLOCKS, 0)
    assert (len(server.blocks), server.aborted, flying.pinned) == (*closed, 0)


@pytest.mark.parametrize("changed", [False, True])
def test_a_load_is_reported_after_its_end_and_its_words_are_checked_then(flying, gpu, server, changed):
    flying.load(0)
    flying.look()
    assert not flying.done
    assert flying.open_leases == 1
    if changed:
        server.word_of[next(iter(server.blocks.values()))[0]] += 1
    gpu.end(LOAD)
    flying.until_done("load-0")
    assert flying.done == {"load-0": 1}
    assert flying.failed == ({"load-0"} if changed else set())
    assert flying.open_leases == 0


@pytest.mark.parametrize("order", [(STORE, LOAD) * 2, (LOAD, LOAD, STORE, STORE), (STORE, STORE, LOAD, LOAD)])
def test_loads_and_stores_are_under_way_at_once_and_settle_as_they_end(flying, gpu, server, order):
    flying.put_up(0)
    flying.load(0)
    flying.put_up(1)
    flying.load(1)
    assert (gpu.under_way(LOAD), gpu.under_way(STORE)) == (2, 2)
    ended = Counter()
    for direction in order:
        gpu.end(direction)
        ended[direction] += 1
        state = (ended[LOAD], (1 + ended[STORE]) * BLOCKS)
        until(lambda state=state: (flying.step(), (len(flying.done), len(server.blocks)) == state)[1], "settled")
    assert not flying.failed
    assert set(flying.done.values()) == {1}


def test_many_loads_at_once_are_each_reported_once(flying, gpu):
    names = {flying.load(number).request_id for number in range(40)}
    assert gpu.under_way(LOAD) == 40
    flying.look()
    assert not flying.done
    gpu.end(LOAD, 7)
    flying.until_done(*(f"load-{number}" for number in range(7)))
    assert len(flying.done) == 7
    gpu.end(LOAD, 33)
    flying.until_done(*names)
    flying.settle()
    assert flying.done == dict.fromkeys(names, 1)
    assert not flying.failed


def test_a_request_aborted_while_its_load_is_under_way_is_reported_once_after_the_end(flying, gpu):
    req = flying.load(0)
    flying.engine.scheduler.request_finished(req, [1])
    flying.look()
    assert not flying.done
    assert flying.open_leases == 1
    gpu.end(LOAD)
    flying.until_done("load-0")
    flying.settle()
    assert flying.done == {"load-0": 1}
    assert flying.failed == {"load-0"}
    assert flying.open_leases == 0


def test_copies_whose_end_rings_no_bell_are_settled_too(flying, gpu, server):
    gpu.rings = False
    flying.load(0)
    flying.put_up(0)
    gpu.end(LOAD)
    gpu.end(STORE)
    flying.until_done("load-0")
    flying.settle()
    assert len(server.blocks) == 2 * BLOCKS


def test_loads_and_stores_begin_at_bind_behind_what_was_given_to_the_gpu_by_then(flying, gpu):
    scheduler, worker = flying.engine.scheduler, flying.engine.workers[0]
    stores, loads = fakes.request("s", [9000 + token for token in PROMPT]), fakes.request("l", PROMPT)
    assert flying.engine.ask(stores) == (0, False)
    scheduler.build_connector_meta(fakes.step({"s": flying.table()}, new=[("s", 0, len(PROMPT))]))
    assert flying.engine.ask(loads) == (TOKENS, True)
    scheduler.update_state_after_alloc(loads, fakes.blocks_of(flying.table()), TOKENS)
    meta = scheduler.build_connector_meta(fakes.step({}))
    assert (len(meta.loads), len(meta.stores)) == (1, 1)
    del gpu.begun[:]
    gpu.moment = "bind"
    worker.bind_connector_metadata(meta)
    gpu.moment = "forward"
    until(lambda: len(gpu.begun) == 2, "both under way before the forward")
    worker.start_load_kv(None)
    worker.wait_for_save()
    flying.copier._bell.ring()
    assert [gpu.events[work.after] for work in gpu.begun] == ["bind", "bind"]
    assert (gpu.under_way(LOAD), gpu.under_way(STORE)) == (1, 1)
    assert gpu.begun[0].check is not None


def refuse(*args):
    raise MemoryError("no room for a log line")


@pytest.mark.parametrize("telling_fails", [False, True])
def test_a_store_begun_in_part_is_aborted_only_after_that_part_has_ended(
    flying, gpu, server, monkeypatch, telling_fails
):
    flying.copier._flights._slow_s = 0.001  # a copy a block
    if telling_fails:
        monkeypatch.setattr(flying.copier._flights, "_note", refuse)
    gpu.refuses[STORE] = [None, errors.DeviceError("refused")]
    flying.put_up(0)
    flying.look()
    assert (flying.pinned, server.aborted) == (BLOCKS, 0)
    gpu.end(STORE)
    flying.settle()
    until(lambda: server.aborted == BLOCKS, "its parts aborted")
    assert (flying.pinned, len(server.blocks)) == (0, BLOCKS)
    assert not flying.copier._flights._touching


def test_a_copy_that_cannot_be_looked_at_is_waited_for(flying, gpu, server):
    flying.put_up(0)
    (work,) = gpu.streams[STORE]
    work.error = MemoryError("no room to look")
    until(lambda: work.waits, "waited for")
    flying.step()
    assert (flying.pinned, server.aborted) == (BLOCKS, 0)
    gpu.end(STORE)
    flying.settle()
    assert (flying.pinned, server.aborted) == (0, BLOCKS)
