"""What a client hands out, and the copies, failing in everything they have: no load is lost, nothing stays pinned."""

import inspect

import broken
import fakes
import pytest
from broken import Bad
from engine import PROMPT, Engine, stored, until
from entry_points import TABLE, go_everywhere

from kvmp import client
from kvmp.paged import PagedKV

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

ERROR = broken.Panic("rust")
PENDING = sorted({*broken.public(client.PendingLookup), *broken.public(client.PendingReserve)})


@pytest.fixture
def build(server, tmp_path, monkeypatch):
    engines = []

    def make(**kwargs):
        engines.append(Engine(server, tmp_path, monkeypatch, extra={"kvmp.timeout_ms": 20}, **kwargs))
        return engines[-1]

    yield make
    monkeypatch.undo()
    for engine in engines:
        engine.close()


def spoil(monkeypatch, kind, name):
    """From now on whoever asks one of these for `name` has an error; while it is made it is sound."""

    def get(self, asked):
        making = inspect.currentframe().f_back.f_code.co_name == "__init__"
        return Bad(ERROR) if asked == name and not making else object.__getattribute__(self, asked)

    monkeypatch.setattr(kind, "__getattribute__", get)


def test_the_reflection_finds_what_is_handed_out():
    assert {"tokens", "slots", "words", "first_block", "release"} <= set(broken.public(client.ReadLease))
    assert {"answers", "lease_id", "handed_over", "cancel"} <= set(broken.public(client.WriteLease))
    assert {"poll", "abandon"} <= set(PENDING)
    assert {"store", "load", "layout"} <= set(broken.public(PagedKV))


@pytest.mark.parametrize("name", broken.public(client.ReadLease))
def test_a_broken_read_lease_never_loses_a_load(name, build, monkeypatch):
    """vLLM waits for this load: whatever happens, it is reported, once."""
    stored(build())
    second = build()
    req = fakes.request("again", PROMPT)
    second.scheduler.on_new_request(req)
    assert second.ask(req) == (16, True)
    spoil(monkeypatch, fakes.ReadLease, name)
    assert second.load(req, TABLE, 16) == (name not in ("slots", "words", "first_block"))


@pytest.mark.parametrize("name", broken.public(client.ReadLease))
def test_a_broken_answer_is_a_miss(name, build, monkeypatch):
    stored(build())
    second = build()
    req = fakes.request("again", PROMPT)
    spoil(monkeypatch, fakes.ReadLease, name)
    assert second.ask(req) == ((0, False) if name in ("tokens", "slots") else (16, True))


@pytest.mark.parametrize("name", broken.public(client.WriteLease))
def test_a_broken_write_lease_leaves_nothing_pinned(name, build, monkeypatch):
    spoil(monkeypatch, fakes.WriteLease, name)
    engine = build()
    stored(engine)
    assert engine.pool.pinned == 0


@pytest.mark.parametrize("name", PENDING)
def test_a_broken_pending_request_is_a_miss_and_leaves_nothing_pinned(name, build, server, monkeypatch):
    engine = build()
    spoil(monkeypatch, fakes.Pending, name)
    req = fakes.request("r", PROMPT)
    assert engine.ask(req) == (0, False)
    until(engine.attached, "attached, also after a lookup that failed")
    server.silent = True  # both are given up
    engine.prefill(req, TABLE)
    engine.drain()
    assert engine.pool.pinned == 0
    server.silent = False
    until(engine.attached, "back after a ping")
    server.silent = True
    assert engine.ask(fakes.request("s", PROMPT)) == (0, False)


@pytest.mark.parametrize("name", broken.public(client.Namespace))
def test_a_broken_namespace_costs_the_cache_only(name, build, monkeypatch):
    spoil(monkeypatch, fakes.Namespace, name)
    engine = build(attach=False)
    stored(engine)
    go_everywhere(engine)
    engine.drain()
    assert engine.pool.pinned == 0


@pytest.mark.parametrize("name", broken.public(PagedKV))
def test_broken_copies_from_the_start_cost_the_cache_only(name, build, monkeypatch):
    """Also of what describes the cache: then this engine is switched off."""
    spoil(monkeypatch, fakes.FakePaged, name)
    engine = build(attach=False)
    stored(engine)
    go_everywhere(engine)
    engine.drain()
    assert engine.pool.pinned == 0


def test_a_copy_that_fails_is_aborted_and_a_load_that_fails_is_reported(build, server, monkeypatch):
    engine = build()
    stored(engine)
    for verb in ("store", "load"):
        monkeypatch.setattr(fakes.FakePaged, verb, Bad(OSError("disk")))
    req = fakes.request("again", [*PROMPT, 1, 2])
    assert engine.ask(req) == (16, True)
    assert not engine.load(req, TABLE, 16)
    engine.prefill(req, TABLE)
    engine.drain()
    assert server.aborted == 1
    assert engine.pool.pinned == 0
