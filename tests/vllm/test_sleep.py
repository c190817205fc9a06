"""vLLM's sleep mode: while the KV cache has no memory, no copy touches it, and nobody waits for one."""

import threading

import fakes
import pytest
from engine import PROMPT, WATCHDOG_S, stored, until

TABLE = [11, 12, 13, 14, 15]


def sleep(engine):
    for worker in engine.workers:
        worker.unregister_kv_caches()


def wake(engine):
    """As vLLM wakes: the workers' caches, then the hand-shake once more."""
    for worker in engine.workers:
        worker.restore_kv_caches()
    parts = {(0, rank): worker.get_handshake_metadata() for rank, worker in enumerate(engine.workers)}
    engine.scheduler.set_xfer_handshake_metadata_pp_aware(parts)


@pytest.fixture
def touched(monkeypatch):
    """Copies that touched tensors."""
    copies = []
    for verb in ("store", "load"):
        real = getattr(fakes.FakePaged, verb)
        monkeypatch.setattr(
            fakes.FakePaged, verb, lambda *args, real=real, verb=verb, **kw: (copies.append(verb), real(*args, **kw))[1]
        )
    return copies


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_during_sleep_fails_and_the_next_one_after_it_succeeds(make, server, touched, ranks):
    stored(make(ranks=ranks))
    engine = make(ranks=ranks)
    link = engine.side._link
    touched.clear()
    sleep(engine)
    early = fakes.request("early", PROMPT)
    assert engine.ask(early) == (16, True)
    assert not engine.load(early, TABLE, 16)
    assert not touched
    wake(engine)
    assert engine.side._link is link
    late = fakes.request("late", PROMPT)
    assert engine.ask(late) == (16, True)
    assert engine.load(late, TABLE, 16)
    assert touched == ["load"] * ranks
    assert engine.count("errors") == 0


def test_a_store_during_sleep_is_aborted_and_pins_nothing(make, server, touched):
    engine = make()
    sleep(engine)
    sleep(engine)
    stored(engine)
    assert not touched
    assert not server.blocks
    assert server.aborted == 4
    assert engine.pool.pinned == 0
    wake(engine)
    wake(engine)
    stored(engine, "other", tokens=PROMPT[2:])
    assert touched == ["store"]
    assert len(server.blocks) == 4
    assert engine.count("errors") == 0


def test_sleep_waits_for_the_copy_under_way(make, monkeypatch):
    engine = make()
    order, copying, go_on = [], threading.Event(), threading.Event()
    real = fakes.FakePaged.store

    def slow(*args, **kwargs):
        copying.set()
        assert go_on.wait(WATCHDOG_S)
        real(*args, **kwargs)
        order.append("copied")

    monkeypatch.setattr(fakes.FakePaged, "store", slow)
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.prefill(req, [1, 2, 3, 4, 5])
    until(lambda: engine.run_step(fakes.step({})) and copying.is_set(), "a copy under way")
    sleeper = threading.Thread(target=lambda: (sleep(engine), order.append("asleep")))
    sleeper.start()
    until(lambda: engine.workers[0]._worker._copier._flights._suspended, "sleep asked for")
    go_on.set()
    sleeper.join(WATCHDOG_S)
    assert order == ["copied", "asleep"]
    wake(engine)
    engine.drain()
    assert engine.pool.pinned == 0


def test_the_scheduler_side_has_nothing_to_put_to_sleep(make):
    engine = make()
    engine.scheduler.unregister_kv_caches()
    engine.scheduler.restore_kv_caches()
    stored(engine)
    assert engine.count("stored_blocks") == 4
