"""The copy thread under faults: what it could not commit is aborted in the end, and every job is reported."""

import fakes
import pytest
from engine import PROMPT, stored, until

from kvmp.errors import BoundExceeded


def copier_of(engine):
    return engine.workers[0]._worker._running_copier()


@pytest.mark.parametrize("verbs", [{"commit"}, {"commit", "abort"}])
def test_a_store_whose_commit_failed_is_aborted_later(make, server, verbs):
    engine = make()
    server.late = verbs
    stored(engine)
    assert engine.count("failed_store_blocks") == 4
    assert "abort" not in verbs or not server.aborted
    server.late = set()
    # Without another store: an idle worker pays too.
    until(lambda: server.aborted == 4, "its parts aborted")
    until(lambda: not len(copier_of(engine)._owed), "nothing owed any more")
    assert engine.pool.pinned == 0


def test_a_lease_that_the_server_does_not_know_is_owed_no_more(make, server):
    engine = make()
    server.late = {"commit"}
    server.unknown_leases = range(1 << 20)
    stored(engine)
    server.late = set()
    until(lambda: not len(copier_of(engine)._owed), "nothing owed any more")
    stored(engine, "next", tokens=PROMPT[2:])
    assert len(server.blocks) == 4


def test_any_number_of_stores_may_be_owed_and_they_go_with_their_session(make, server):
    engine = make()
    copier = copier_of(engine)
    session = engine.side._link.session
    jobs = [fakes.SimpleNamespace(job_id=i, lease_id=i, slots=[i], words=[i], session=session) for i in range(5000)]
    for job in jobs:
        copier._owed.add(job)
    assert len(copier._owed) == 5000
    copier._membership._leave(session)
    copier._owed.drop_left()
    assert not len(copier._owed)


@pytest.mark.parametrize(("part", "broken"), [("_flights", "_note"), ("_jobs", "is_void"), ("_flights", "_pieces")])
def test_no_fault_of_its_own_ends_the_copy_thread_or_leaves_a_job_unreported(make, server, part, broken, monkeypatch):
    stored(make())
    engine = make()
    copier = copier_of(engine)

    def fail(*args):
        raise MemoryError(broken)

    monkeypatch.setattr(getattr(copier, part), broken, fail)
    monkeypatch.setattr(fakes.FakePaged, "load", fail)
    req = fakes.request("again", PROMPT)
    assert engine.ask(req) == (16, True)
    assert not engine.load(req, [11, 12, 13, 14, 15], 16)
    other = fakes.request("other", PROMPT[2:])
    engine.ask(other)
    engine.prefill(other, [1, 2, 3, 4, 5])
    engine.drain()
    assert engine.pool.pinned == 0
    assert copier._thread.is_alive()


@pytest.mark.parametrize("broken", ["watch", "take_closed", "follow"])
def test_looking_after_the_session_may_fail(make, server, broken, monkeypatch):
    engine = make()
    copier, calls = copier_of(engine), []

    def fail(*args):
        calls.append(broken)
        raise BoundExceeded(broken)

    real = getattr(copier._membership, broken)
    monkeypatch.setattr(copier._membership, broken, fail)
    engine.run_step(fakes.step({}))
    until(lambda: calls, "it failed")
    assert copier._thread.is_alive()
    monkeypatch.setattr(copier._membership, broken, real)
    stored(engine)
    assert len(server.blocks) == 4
