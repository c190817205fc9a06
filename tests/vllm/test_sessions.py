"""Whose session a worker is in: left once is left for good, and the scheduler side makes a new one."""

import time

import fakes
import pytest
from engine import PROMPT, results_of, stored, until
from fake_device import DevicePaged

from kvmp import errors
from kvmp.vllm.joined import Membership
from kvmp.vllm.metadata import SessionRef

TABLE = [1, 2, 3, 4, 5]


def membership_of(engine, rank=0):
    return engine.workers[rank]._worker._running_copier()._membership


def client_of(server, engine):
    """The client of the engine's worker."""
    return next(client for client in reversed(server.clients) if client.part is not None and not client.closed)


def token_of(engine):
    session = engine.side._link.session
    return session.engine_token if session else None


def follow(engine):
    """An idle step: workers hear which session is in use."""
    engine.run_step(fakes.step({}))


def granted(engine, req_id="r", tokens=PROMPT):
    """A step's metadata with one store that no worker has seen yet."""
    req = fakes.request(req_id, tokens)
    engine.ask(req)
    # The workers hear nothing of it: metadata is made, not bound.
    engine.scheduler.build_connector_meta(fakes.step({req_id: TABLE}, new=[(req_id, 0, len(tokens))]))
    meta = engine.scheduler.build_connector_meta(fakes.step({}))
    assert len(meta.stores) == 1
    return meta


def report_of(engine, meta):
    """What the one worker reports of the metadata's stores."""
    worker, reports = engine.workers[0], []
    worker.bind_connector_metadata(meta)
    worker.wait_for_save()

    def reported():
        results_of(worker)
        report = worker.build_connector_worker_meta()
        if report is not None:
            reports.append(report)
        return any(report.stores for report in reports)

    until(reported, "the store's report")
    total = reports[0]
    for report in reports[1:]:
        total = total.aggregate(report)
    engine.scheduler.update_connector_output(fakes.output(report=total))
    return total


def test_a_session_that_was_left_is_never_joined_again(make, server):
    """The server has closed the part and granted its slots anew: a store queued before must not be copied."""
    engine = make()
    stored(engine)
    token = token_of(engine)
    meta = granted(engine, "late", PROMPT[1:])
    arena = len(server.arena)
    client_of(server, engine).hung_up = True  # the worker's own session only
    joins = len([client for client in server.clients if client.part is not None])
    report = report_of(engine, meta)
    assert report.stores == {meta.stores[0].job_id: {0: 0}}
    assert report.closed == {token}
    assert len(server.arena) == arena
    assert len([client for client in server.clients if client.part is not None]) == joins
    assert not len(engine.workers[0]._worker._copier._owed)
    # The scheduler side goes on in a new session, and so does the worker.
    until(lambda: token_of(engine) not in (None, token), "attached with another token")
    until(engine.attached, "its namespace open")
    stored(engine, "next", tokens=PROMPT[2:])
    assert len(server.blocks) == 8


def test_a_worker_whose_part_was_closed_has_the_engine_attach_anew(make, server):
    engine = make()
    token = token_of(engine)
    server.closed_parts.add((token, 0))

    def renewed():
        follow(engine)
        return token_of(engine) not in (None, token)

    until(renewed, "attached with another token")
    until(engine.attached, "its namespace open")
    stored(engine)
    assert len(server.blocks) == 4


def test_a_worker_joins_before_its_first_copy_and_leaves_with_its_scheduler(make, server):
    engine = make()
    follow(engine)
    membership = membership_of(engine)
    until(lambda: membership.joined, "joined early")
    first = client_of(server, engine)
    assert first.engine_token == token_of(engine)
    assert first.joins == [server.digests[0]]
    engine.side._link.renew(frozenset({first.engine_token}))
    until(lambda: token_of(engine) not in (None, first.engine_token), "a new session")

    def moved():
        follow(engine)
        return first.closed and membership.session is not None and membership.session.engine_token == token_of(engine)

    until(moved, "the worker left the old session and joined the new one")


def test_a_worker_leaves_with_its_scheduler_even_when_it_can_join_no_other_session(make, server):
    engine = make()
    follow(engine)
    membership = membership_of(engine)
    until(lambda: membership.joined, "joined early")
    first = client_of(server, engine)
    server.closed_parts = {(token, 0) for token in range(first.engine_token + 1, 10_000)}
    engine.side._link.renew(frozenset({first.engine_token}))

    def left():
        follow(engine)
        return first.closed

    until(left, "the worker left the old session")
    assert not membership.joined


def test_no_step_without_a_session_makes_a_worker_leave(make, server):
    engine = make()
    stored(engine)
    membership, session = membership_of(engine), membership_of(engine).session
    server.silent = True
    engine.side._link.mark_lost(engine.side._link._session)
    follow(engine)
    until(lambda: not engine.side._link.up, "lost")
    follow(engine)
    assert membership.session == session
    server.silent = False
    until(engine.attached, "back after a ping")
    stored(engine, "next", tokens=PROMPT[2:])
    assert membership.session == session


def test_a_busy_worker_leaves_a_server_that_is_gone(make, server):
    """Watched between jobs too: a worker with work all the time would hold its entry for ever."""
    stored(make())
    engine = make()
    loads = fakes.request("again", PROMPT)
    assert engine.ask(loads) == (16, True)
    follow(engine)
    membership = membership_of(engine)
    until(lambda: membership.joined, "joined early")
    copier = engine.workers[0]._worker._copier
    copier._await_work = lambda: None  # as if there were always work
    client_of(server, engine).hung_up = True
    assert not engine.load(loads, [11, 12, 13, 14, 15], 16)
    assert not membership.joined


@pytest.mark.parametrize("same_session", [True, False])
def test_a_refusal_holds_for_its_session_and_namespace_only(make, server, same_session, caplog_vllm):
    engine = make()
    layout = server.specs[0]["parts"][0]["layout"]
    server.specs[0]["parts"][0]["layout"] = {"other": 1}
    follow(engine)
    until(lambda: engine.run_step(fakes.step({})) and caplog_vllm.warnings(), "the refusal")
    stored(engine)
    assert not server.blocks
    assert not server.reserves
    server.specs[0]["parts"][0]["layout"] = layout
    if same_session:
        engine.scheduler.reset_cache()
    else:
        engine.side._link.renew(frozenset({token_of(engine)}))
    until(engine.attached, "another namespace or session")

    def joined():
        follow(engine)
        stored(engine, "next", tokens=PROMPT[2:])
        server.reserves.clear()
        return server.blocks

    membership_of(engine)._failed = None  # as if its second had passed
    until(joined, "stored again")
    assert len(caplog_vllm.warnings()) == 1


def joining(membership, server):
    """Joins a session of that token, and gives its client."""

    def join(token):
        membership.join(SessionRef("unix:/fake", token, server.epoch, server.segment), None)
        return membership.client

    return join


def test_a_mapping_is_kept_for_the_servers_next_life_and_not_for_ever(server):
    now = [0.0]
    membership = Membership(0, "{}", None, connect=server.connect, clock=lambda: now[0])
    join = joining(membership, server)
    first = join(7)
    membership.close()
    now[0] = 59.0
    membership.watch()
    assert membership.watchful
    second = join(8)
    membership.close()
    assert membership.take_dropped() == []
    now[0] += 61.0
    membership.watch()
    assert not membership.watchful
    assert membership.take_dropped() == [second]
    join(9)
    assert server.reused == [None, first, None]
    assert second is not first
    membership.close()
    assert membership.take_dropped() == []


def test_a_mapping_of_another_segment_is_dropped_at_once(server):
    membership = Membership(0, "{}", None, connect=server.connect)
    join = joining(membership, server)
    first = join(7)
    membership.close()
    server.segment = "segment-2"
    second = join(8)
    assert membership.take_dropped() == [first]
    server.segment = "segment-3"
    join(9)
    assert membership.take_dropped() == [second]
    assert second.closed
    membership.close()


def test_a_mapping_is_taken_over_from_a_session_that_is_still_joined(server):
    membership = Membership(0, "{}", None, connect=server.connect)
    join = joining(membership, server)
    first = join(7)
    join(8)
    assert server.reused == [None, first]
    assert first.closed
    assert membership.take_dropped() == []
    membership.close()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_device_knows_of_an_arena_is_let_go_of_with_its_mapping(make, server, gpu, fails):
    """A segment may be removed, or its server stay away: its memory must not stay pinned until the engine ends."""
    forgotten = []

    class Paged(DevicePaged):
        def forget(self, client):
            forgotten.append(client)
            if fails:
                raise errors.DeviceError("no")

    gpu.at_once = True
    engine = make(paged=lambda tensors, *, num_blocks=None: Paged(gpu, tensors, num_blocks))
    stored(engine)
    membership = membership_of(engine)
    client = membership.client
    server.gone = True
    until(lambda: not membership.joined, "left the server that is gone")
    until(lambda: membership.watchful, "its mapping kept")
    assert not forgotten
    membership._clock = lambda: time.monotonic() + 61
    until(lambda: forgotten, "let go of")
    assert forgotten == [client]
    server.gone = False
    until(engine.attached, "back")
    stored(engine, "next", tokens=PROMPT[2:])
    assert len(server.blocks) == 8
