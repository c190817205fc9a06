"""No server at the start: degrade, fail or spawn, as the user chose."""

import logging
import os

import fakes
import pytest
from engine import PROMPT, stored, until

from kvmp import background
from kvmp.config import ConnectorConfig
from kvmp.errors import ConnectError, KvmpError
from kvmp.vllm.unreachable import Spawner

SPAWN = {"kvmp.on_unreachable": "spawn", "kvmp.spawn_size": "64MiB"}


def test_degrade_starts_warns_once_and_attaches_when_a_server_comes(make, server, caplog_vllm):
    server.gone = True
    engine = make(attach=False)
    until(lambda: caplog_vllm.warnings(), "the warning")
    assert engine.ask(fakes.request("r", PROMPT)) == (0, False)
    server.gone = False
    until(engine.attached, "attached")
    stored(engine)
    assert len(server.blocks) == 4
    (warning,) = caplog_vllm.warnings()
    assert "this starts one: kvmp serve --size 4GiB" in warning


def test_fail_refuses_the_start_with_the_command_that_mends_it(make, server):
    server.gone = True
    with pytest.raises(ConnectError, match=r"on_unreachable is 'fail'.*this starts one: kvmp serve --size"):
        make(extra={"kvmp.on_unreachable": "fail"})


def test_fail_starts_beside_a_server_and_outlives_it(make, server):
    engine = make(extra={"kvmp.on_unreachable": "fail"})
    stored(engine)
    server.gone = True
    assert engine.ask(fakes.request("r", PROMPT)) == (0, False)


def test_spawn_starts_a_server_in_the_background(make, server, monkeypatch):
    server.gone, started = True, []

    def start(size, endpoint, *, until_pid):
        started.append((size, until_pid))
        server.gone = False
        return

    monkeypatch.setattr(background, "start", start)
    engine = make(extra=SPAWN)
    assert started == [("64MiB", os.getpid())]
    stored(engine)


def test_a_spawn_that_fails_is_not_tried_again_at_once(monkeypatch, caplog):
    tries = []

    def start(size, endpoint, *, until_pid):
        tries.append(size)
        raise KvmpError("no room")

    monkeypatch.setattr(background, "start", start)
    spawner = Spawner(ConnectorConfig(on_unreachable="spawn", spawn_size="1GiB"), logging.getLogger("test"))
    assert not spawner.start()
    assert not spawner.start()
    assert tries == ["1GiB"]
    assert "no room" in caplog.text


def test_nothing_is_spawned_unasked(monkeypatch):
    monkeypatch.setattr(background, "start", None)
    assert not Spawner(ConnectorConfig(), logging.getLogger("test")).start()
