"""Every entry point of the connector, with a client and workers that fail in every way: nothing raises into vLLM."""

import broken
import fakes
import pytest
from broken import Bad, FailingClient
from engine import PROMPT, Engine, until
from entry_points import (
    ANSWERED_IN_ANOTHER_WAY,
    ARGUMENTS,
    ENTRIES,
    MISSING_HERE,
    TABLE,
    calls,
    check,
    go,
    go_everywhere,
    is_own,
)

from kvmp.vllm.connector import KvmpConnector

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def test_the_reflection_finds_methods_class_methods_properties_and_values_of_every_release():
    methods = {"get_num_new_matched_tokens", "build_connector_meta", "get_finished", "start_load_kv"}
    of_0_33 = {"unregister_kv_caches", "restore_kv_caches"}
    of_the_class = {"build_kv_connector_stats", "get_required_kvcache_layout", "build_prom_metrics"}
    read = {"requires_kv_delivery", "role", "_cache_hit_source"}
    everything = set(ENTRIES) | ANSWERED_IN_ANOTHER_WAY
    assert methods | of_0_33 | of_the_class | read <= everything | MISSING_HERE
    assert {name for name, ways in ENTRIES.items() if not ways} >= {"requires_kv_delivery", "role"}
    assert {p for name in ENTRIES for given in calls(name) for p in given} <= set(ARGUMENTS)
    # What cannot be gone here is another release's, and runs none of our code there.
    assert not any(is_own(name) for name in MISSING_HERE)
    # Nothing of the connector's own is left out: private ones are not vLLM's.
    assert {name for name in vars(KvmpConnector) if not name.startswith("_")} <= everything


def test_the_reflection_finds_what_a_client_has():
    assert {"submit_lookup", "commit", "distrust", "check_sums", "store_blocks", "waited_us"} <= set(broken.METHODS)
    assert set(broken.CALLED) <= set(broken.METHODS)
    assert "Busy" in {type(error).__name__ for error in broken.ERRORS}


@pytest.fixture
def engine(server, tmp_path, monkeypatch):
    """An engine that is attached, whose sessions can be broken; with `kvmp.verify`, which calls more of them."""
    monkeypatch.setattr(fakes, "FakeClient", FailingClient)
    made = Engine(server, tmp_path, monkeypatch, extra={"kvmp.timeout_ms": 5, "kvmp.verify": "always"})
    yield made
    FailingClient.broken = ""
    made.close()


def live_with(engine, method, error=None, rubbish=None):
    """A request and every entry point while one thing is broken; afterwards nothing is pinned."""
    FailingClient.error, FailingClient.rubbish, FailingClient.broken = error, rubbish, method
    live_through_a_request(engine)
    go_everywhere(engine)
    engine.drain()
    assert engine.pool.pinned == 0


@pytest.mark.parametrize("error", broken.FIRST, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", broken.METHODS)
def test_every_entry_point_while_a_method_of_the_client_fails(engine, method, error):
    live_with(engine, method, error)


@pytest.mark.parametrize("method", broken.CALLED)
@pytest.mark.parametrize("error", broken.ERRORS, ids=lambda e: type(e).__name__)
def test_every_entry_point_with_every_error(engine, method, error):
    live_with(engine, method, error)


@pytest.mark.parametrize("rubbish", broken.RUBBISH, ids=repr)
@pytest.mark.parametrize("method", broken.METHODS)
def test_every_entry_point_while_a_method_answers_rubbish(engine, method, rubbish):
    live_with(engine, method, rubbish=rubbish)


@pytest.mark.parametrize("error", broken.ERRORS, ids=lambda e: type(e).__name__)
def test_every_entry_point_while_nobody_can_connect(server, tmp_path, monkeypatch, error):
    monkeypatch.setattr(server, "connect", Bad(error))
    engine = Engine(server, tmp_path, monkeypatch, attach=False)
    live_through_a_request(engine)
    go_everywhere(engine)
    assert engine.pool.pinned == 0
    engine.close()


def live_through_a_request(engine):
    req = fakes.request("r", PROMPT)
    engine.scheduler.on_new_request(req)
    tokens, is_async = engine.ask(req)
    if tokens:
        assert is_async
        engine.load(req, TABLE, tokens)
    engine.prefill(req, TABLE)
    engine.drain()
    engine.scheduler.request_finished(req, TABLE)


# Entry points of kvmp's own that take something; in the base's own code an argument is vLLM's.
TAKING = sorted((name, given) for name in ENTRIES if is_own(name) for given in calls(name) if given)


@pytest.mark.parametrize(("name", "given"), TAKING, ids=lambda value: value if isinstance(value, str) else "")
def test_arguments_that_fail(name, given, server, tmp_path, monkeypatch):
    engine = Engine(server, tmp_path, monkeypatch)
    for connector in (engine.scheduler, *engine.workers):
        check(name, go(engine, connector, name, given, Bad(RuntimeError("bad argument"))))
    engine.drain()
    engine.close()


def test_a_cause_is_logged_once(server, tmp_path, monkeypatch, caplog_vllm):
    engine = Engine(server, tmp_path, monkeypatch)
    for _ in range(3):
        check("get_num_new_matched_tokens", engine.scheduler.get_num_new_matched_tokens(Bad(KeyError("x")), 0))
    assert engine.count("errors") == 3
    assert len(caplog_vllm.warnings()) == 1
    engine.close()


def test_a_worker_the_server_refuses_stops_storing(server, tmp_path, monkeypatch, caplog_vllm):
    engine = Engine(server, tmp_path, monkeypatch)
    server.specs[0]["parts"][0]["layout"] = {"other": 1}
    live_through_a_request(engine)
    assert not server.blocks
    (warning,) = caplog_vllm.warnings()
    assert "refuses a worker" in warning
    reserves = len(server.reserves)
    engine.prefill(fakes.request("s", PROMPT[1:]), TABLE)
    assert len(server.reserves) == reserves
    until(lambda: not engine.scheduler.has_pending_push_work(), "idle")
    engine.close()
