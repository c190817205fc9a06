"""Every entry point of the connector, with a client and workers that fail in every way: nothing raises into vLLM."""

import inspect

import fakes
import pytest
from engine import PROMPT, Engine, until
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvmp.errors import BoundExceeded, ServerLost

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

TABLE = [1, 2, 3, 4, 5]


class Bad:
    """Whatever is done with it raises."""

    def __init__(self, error):
        object.__setattr__(self, "_error", error)

    def _raise(self, *args, **kwargs):
        raise object.__getattribute__(self, "_error")

    __getattr__ = __call__ = __len__ = __iter__ = __bool__ = __int__ = _raise
    __lt__ = __gt__ = __add__ = __radd__ = __sub__ = __getitem__ = _raise


class Panic(BaseException):
    """As PyO3 raises a panic in Rust: no `Exception`."""


ERRORS = (
    Panic("rust"),
    ServerLost("gone"),
    BoundExceeded("late"),
    MemoryError(),
    AttributeError("x"),
    KeyError(1),
)


class FailingClient(fakes.FakeClient):
    """A session in which one method fails, or everything it hands out does."""

    broken = ""
    error = RuntimeError("broken")

    def __getattribute__(self, name):
        if name == type(self).broken:
            return Bad(type(self).error)
        return super().__getattribute__(name)


METHODS = (
    "lost",
    "ping",
    "open",
    "join",
    "submit_lookup",
    "submit_reserve",
    "commit",
    "abort",
    "close",
    "endpoint",
    "server_epoch",
)
# Methods that are no hook: vLLM calls these on the class before there is an engine, or reads them as values.
ARGUMENTS = {
    "request": lambda engine: fakes.request("q", PROMPT),
    "num_computed_tokens": lambda engine: 0,
    "num_external_tokens": lambda engine: 0,
    "blocks": lambda engine: fakes.blocks_of(TABLE),
    "block_ids": lambda engine: [1],
    "scheduler_output": lambda engine: fakes.step({"q": TABLE}, new=[("q", 0, 18)]),
    "connector_output": lambda engine: fakes.output(),
    "connector_metadata": lambda engine: engine.scheduler.build_connector_meta(fakes.step({})),
    "kv_connector_metadata": lambda engine: engine.scheduler.build_connector_meta(fakes.step({})),
    "finished_req_ids": lambda engine: set(),
    "forward_context": lambda engine: None,
    "layer_name": lambda engine: "layer.0",
    "kv_layer": lambda engine: None,
    "attn_metadata": lambda engine: None,
    "kv_caches": lambda engine: {},
    "copy_operation": lambda engine: None,
    "metadata": lambda engine: {},
    "gpu_block_pool": lambda engine: engine.pool,
    "kv_cache_manager": lambda engine: fakes.SimpleNamespace(block_pool=engine.pool),
    "partial_tail_offloads": lambda engine: [],
}
OWN_TO_THE_BASE = {"get_loaded_kv_cache_group_ids"}


def hooks():
    for name, member in inspect.getmembers(KVConnectorBase_V1, inspect.isfunction):
        if not name.startswith("_") and name not in OWN_TO_THE_BASE:
            yield name, [p for p in inspect.signature(member).parameters.values() if p.name not in ("self", "kwargs")]


HOOKS = dict(hooks())


def call(engine, connector, name, bad=None):
    values = [bad if bad is not None else ARGUMENTS[p.name](engine) for p in HOOKS[name]]
    return getattr(connector, name)(*values)


SANE = {
    "get_num_new_matched_tokens": lambda result: result in ((0, False), (None, False), (16, True)),
    "request_finished": lambda result: result == (False, None),
    "build_connector_meta": lambda result: type(result).__name__ == "StepMeta",
    "get_finished": lambda result: result == (None, None),
    "get_transfer_results": lambda result: not (result.finished_sending or result.failed_recving),
    "get_block_ids_with_load_errors": lambda result: result == set(),
    "has_pending_push_work": lambda result: isinstance(result, bool),
    "has_pending_block_frees": lambda result: isinstance(result, bool),
    "reset_cache": lambda result: result is True,
    "take_events": lambda result: not list(result),
}


def check(name, result):
    assert SANE.get(name, lambda result: True)(result), (name, result)


def test_the_reflection_finds_the_hooks():
    assert {"get_num_new_matched_tokens", "build_connector_meta", "get_finished", "start_load_kv"} <= set(HOOKS)
    assert {p.name for parameters in HOOKS.values() for p in parameters} <= set(ARGUMENTS)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", METHODS)
def test_every_hook_with_a_broken_client(method, error, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fakes, "FakeClient", FailingClient)
    monkeypatch.setattr(FailingClient, "error", error)
    engine = Engine(server, tmp_path, monkeypatch, extra={"kvmp.timeout_ms": 5})
    monkeypatch.setattr(FailingClient, "broken", method)
    try:
        live_through_a_request(engine)
        for connector in (engine.scheduler, *engine.workers):
            for name in HOOKS:
                check(name, call(engine, connector, name))
        engine.drain()
        assert engine.pool.pinned == 0
    finally:
        monkeypatch.setattr(FailingClient, "broken", "")
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


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_hook_with_arguments_that_fail(name, server, tmp_path, monkeypatch):
    engine = Engine(server, tmp_path, monkeypatch)
    if name in ("bind_kv_cache_manager", "shutdown"):
        pytest.skip("vLLM's own base method, or without arguments")
    try:
        for connector in (engine.scheduler, *engine.workers):
            if name in ("set_xfer_handshake_metadata", "register_kv_caches", "bind_connector_metadata"):
                continue
            check(name, call(engine, connector, name, Bad(RuntimeError("bad argument"))))
    finally:
        engine.close()


@pytest.mark.parametrize("broken", ["slots", "words", "release", "tokens", "first_block"])
def test_a_broken_read_lease_never_loses_a_load(broken, server, tmp_path, monkeypatch):
    first = Engine(server, tmp_path, monkeypatch)
    live_through_a_request(first)
    second = Engine(server, tmp_path, monkeypatch)
    req = fakes.request("again", PROMPT)
    second.scheduler.on_new_request(req)
    if broken == "tokens":
        monkeypatch.setattr(fakes.ReadLease, "__getattribute__", _without("tokens"))
        assert second.ask(req) == (0, False)
    else:
        assert second.ask(req) == (16, True)
        monkeypatch.setattr(fakes.ReadLease, "__getattribute__", _without(broken))
        # vLLM waits for this load: whatever happens, it is reported, once.
        assert second.load(req, TABLE, 16) == (broken == "release")
    monkeypatch.undo()
    first.close()
    second.close()


def _without(name):
    def get(self, asked):
        if asked == name:
            raise RuntimeError(f"{name} is broken")
        return object.__getattribute__(self, asked)

    return get


@pytest.mark.parametrize("broken", ["answers", "slots", "lease_id", "handed_over"])
def test_a_broken_write_lease_leaves_nothing_pinned(broken, server, tmp_path, monkeypatch):
    engine = Engine(server, tmp_path, monkeypatch)
    monkeypatch.setattr(fakes.WriteLease, "__getattribute__", _broken_later(broken))
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.prefill(req, TABLE)
    engine.drain()
    assert engine.pool.pinned == 0
    engine.close()


def _broken_later(name):
    """Fails outside the lease's own constructor only."""
    plain = _without(name)

    def get(self, asked):
        inside = inspect.currentframe().f_back.f_code.co_name == "__init__"
        return object.__getattribute__(self, asked) if inside else plain(self, asked)

    return get


def test_copy_that_fails_is_aborted_and_load_that_fails_is_reported(server, tmp_path, monkeypatch):
    engine = Engine(server, tmp_path, monkeypatch)
    live_through_a_request(engine)
    monkeypatch.setattr(fakes.FakePaged, "store", Bad(OSError("disk")))
    monkeypatch.setattr(fakes.FakePaged, "load", Bad(OSError("disk")))
    req = fakes.request("again", [*PROMPT, 1, 2])
    assert engine.ask(req) == (16, True)
    assert not engine.load(req, TABLE, 16)
    engine.prefill(req, TABLE)
    engine.drain()
    assert server.aborted == 1
    assert engine.pool.pinned == 0
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
