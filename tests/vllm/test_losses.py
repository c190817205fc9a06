"""A server that goes: one warning for each loss, whatever was under way, and a gauge that says so for as long."""

import fakes
import pytest
from engine import PROMPT, stored, until

from kvmp.vllm.stats import KvmpStats

TABLE = [1, 2, 3, 4, 5]


def lose_idle(engine):
    engine.server.gone = True


def lose_in_a_lookup(engine):
    engine.server.silent = True
    req = fakes.request("looks up", PROMPT)
    engine.scheduler.on_new_request(req)
    assert engine.scheduler.get_num_new_matched_tokens(req, 0) == (None, False)
    engine.server.gone = True
    assert engine.ask(req) == (0, False)


def lose_before_a_reserve(engine):
    """The hang-up is first seen by the reserve itself."""
    req = fakes.request("reserves", PROMPT[1:])
    assert engine.ask(req) == (0, False)
    engine.server.gone = True
    engine.prefill(req, TABLE)
    assert engine.pool.pinned == 0


def lose_in_a_reserve(engine):
    req = fakes.request("reserves", PROMPT[1:])
    assert engine.ask(req) == (0, False)
    engine.server.silent = True
    engine.prefill(req, TABLE)
    assert engine.pool.pinned == 4
    engine.server.gone = True
    engine.drain()


def lose_in_a_store(engine):
    req = fakes.request("stores", PROMPT[1:])
    assert engine.ask(req) == (0, False)
    engine.server.late = {"commit"}
    engine.prefill(req, TABLE)
    engine.drain()
    engine.server.gone = True


def lose_in_a_load(engine):
    req = fakes.request(f"loads {engine.server.epoch}", PROMPT)
    assert engine.ask(req) == (16, True)
    engine.server.gone = True
    engine.workers[0]._worker._copier._membership.close()
    assert not engine.load(req, [11, 12, 13, 14, 15], 16)


LOSSES = [lose_idle, lose_in_a_lookup, lose_before_a_reserve, lose_in_a_reserve, lose_in_a_store, lose_in_a_load]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_one_warning_a_loss(make, server, caplog_vllm, lose):
    engine = make()
    stored(engine)
    for losses in (1, 2):
        lose(engine)
        until(lambda losses=losses: len(caplog_vllm.warnings()) == losses, "the warning")
        until(lambda: not engine.side.attached, "lost")
        server.gone, server.silent, server.late = False, False, set()
        server.epoch += 1
        until(engine.attached, "attached again")
        assert len(caplog_vllm.warnings()) == losses


def test_a_server_that_answers_again_is_said_to(make, server, caplog_vllm, caplog):
    caplog.set_level("INFO", "vllm.kvmp")
    engine = make(extra={"kvmp.timeout_ms": 20})
    server.silent = True
    req = fakes.request("r", PROMPT)
    assert engine.ask(req) == (0, False)
    until(lambda: caplog_vllm.warnings(), "the warning")
    server.silent = False
    until(engine.attached, "back after a ping")
    assert [r for r in caplog_vllm.handler.records if "answers again" in r.getMessage()]
    assert len(caplog_vllm.warnings()) == 1


def test_being_without_a_server_is_news_for_as_long_as_it_lasts(make, server):
    """A green engine that runs without its cache says so in every interval of vLLM's log; one that has it does not."""
    engine = make()
    (worker,) = engine.workers
    assert engine.scheduler.get_kv_connector_stats() is None
    server.gone = True
    until(lambda: not engine.side.attached, "lost")
    for _ in range(3):
        assert engine.scheduler.get_kv_connector_stats().reduce()["attached"] == 0
    assert worker.get_kv_connector_stats() is None
    server.gone = False
    until(engine.attached, "attached again")
    taken = engine.scheduler.get_kv_connector_stats()
    assert taken is None or taken.reduce()["attached"] == 1


def test_a_side_that_never_came_up_is_not_attached(make, caplog_vllm):
    engine = make(attach=False, role="kv_producer")
    assert engine.scheduler.get_kv_connector_stats().reduce()["attached"] == 0
    assert any("switched off" in warning for warning in caplog_vllm.warnings())


def test_the_last_gauge_and_the_largest_maximum_win():
    seen = KvmpStats({"attached": 1, "longest_hold_us": 7, "lookups": 1})
    seen.aggregate(KvmpStats({"attached": 0, "longest_hold_us": 3, "lookups": 2}))
    assert seen.reduce() == {"attached": 0, "longest_hold_us": 7, "lookups": 3}
    seen.aggregate(KvmpStats({"lookups": 1}))
    assert seen.reduce()["attached"] == 0
