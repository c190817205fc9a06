"""What kvmp's calls wait on an engine's thread: moments, and never more than `kvmp.timeout_ms` in a step."""

import os
import time

import fakes
import pytest
from engine import PROMPT, WATCHDOG_S, stored

import kvmp
from kvmp.client import Client, limit_waits
from kvmp.errors import BoundExceeded, ServerLost
from kvmp.vllm import connector
from kvmp.vllm.guard import Guard
from kvmp.vllm.stats import KvmpStats
from kvmp.vllm.step_waits import StepWaits
from tests.stopping import stopped

TIMEOUT_MS = 100


@pytest.fixture
def frozen():
    """A client of a real server that is stopped."""
    with kvmp.launch("16MiB", name=f"engine-step-waits-{os.getpid()}") as server:
        client = Client.connect(server.endpoint, role="tool")
        client.ping(timeout_ms=5000)
        with stopped(server.pid):
            yield client
        client.close()


def guarded(stats):
    return Guard(connector.logger, stats, StepWaits(TIMEOUT_MS, stats))


def ask_for_ever(client, raised):
    """A call that would wait for two seconds by its own bound."""
    try:
        client.ping(timeout_ms=2000)
    except (BoundExceeded, ServerLost) as error:
        raised.append(error)


def test_calls_that_wait_share_the_steps_budget_and_are_counted(frozen):
    """The control: the counter that stays 0 elsewhere rises here, and many calls cost no more than one bound."""
    stats, raised = KvmpStats(), []
    guard = guarded(stats)
    begun = time.monotonic()
    for _ in range(10):
        guard.run("entry", lambda: ask_for_ever(frozen, raised), None)
    assert len(raised) == 10
    assert time.monotonic() - begun < WATCHDOG_S
    first = stats.data["longest_step_wait_us"]
    assert TIMEOUT_MS * 1000 <= first < 10 * TIMEOUT_MS * 1000
    # The next step has a budget of its own, and is counted by itself.
    guard.begin_step()
    guard.run("entry", lambda: ask_for_ever(frozen, raised), None)
    assert stats.data["longest_step_wait_us"] < 10 * TIMEOUT_MS * 1000
    assert frozen.waited_us >= 2 * TIMEOUT_MS * 1000


def test_only_the_engines_thread_is_bounded(frozen):
    """What the threads of link and copier wait is not the engine's: their bounds are their own."""
    stats = KvmpStats()
    guard = guarded(stats)
    guard.run("entry", lambda: None, None)
    with pytest.raises(BoundExceeded, match="250 ms"):
        frozen.ping(timeout_ms=250)
    assert limit_waits(None) >= 250_000
    assert not stats.data.get("longest_step_wait_us")


def test_a_whole_life_of_an_engine_waits_for_nothing(make, server):
    engine = make(ranks=2, extra={"kvmp.timeout_ms": 20})
    stored(engine)
    again = fakes.request("again", PROMPT)
    assert engine.ask(again) == (16, True)
    assert engine.load(again, [11, 12, 13, 14, 15], 16)
    server.silent = True
    late = fakes.request("late", PROMPT)
    assert engine.ask(late) == (0, False)
    for part in (engine.scheduler, *engine.workers):
        assert part._stats.data["step_us"]
        assert "longest_step_wait_us" not in part._stats.data
    assert 0 < engine.scheduler._stats.data["longest_hold_us"] < 20_000 <= engine.count("lookup_wait_us")


@pytest.mark.parametrize("side", ["scheduler", "worker"])
def test_a_step_begins_where_it_should(make, side, monkeypatch):
    """Scheduler side: after `build_connector_meta`; worker: with the bind."""
    engine = make()
    part = engine.scheduler if side == "scheduler" else engine.workers[0]
    waited = iter([0, 70, 0, 60, 0, 0] + [0] * 1000)
    monkeypatch.setattr("kvmp.vllm.step_waits.limit_waits", lambda left=None: next(waited))
    part.has_pending_push_work() if side == "scheduler" else part.wait_for_save()
    part.has_pending_push_work() if side == "scheduler" else part.wait_for_save()
    assert part._stats.data["longest_step_wait_us"] == 130
    engine.run_step(fakes.step({}))
    assert part._guard._waits._waited_us == 0
    assert part._stats.data["longest_step_wait_us"] == 130


def test_the_moments_of_a_step_have_a_sum(make, server, monkeypatch):
    """Questions that are sent one after the other, as after a new session, are not all given one."""
    engine, given = make(), []

    def poll(pending, moment_us=0):
        given.append(moment_us)
        time.sleep(moment_us / 1e6)

    monkeypatch.setattr(fakes.Pending, "poll", poll)
    for number in range(10):
        request = fakes.request(f"r{number}", [token + number for token in PROMPT])
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert given[0] == 300
    assert sum(given) <= 1000
    assert given[-1] == 0
    engine.scheduler.build_connector_meta(fakes.step({}))
    assert engine.scheduler.get_num_new_matched_tokens(fakes.request("new", PROMPT), 0) == (None, False)
    assert given[-1] == 300
