"""No server at the start: degrade, fail or spawn, as the user chose."""

import itertools
import logging
import os
import socket
import threading

import fakes
import pytest
from engine import PROMPT, stored, until

from kvmp import background
from kvmp.config import ConnectorConfig
from kvmp.errors import ConnectError, KvmpError
from kvmp.vllm import connecting
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


def test_fail_beside_another_program_starts_no_second_one_there(make, server, monkeypatch):
    def refuse(*args, **options):
        raise ConnectError("what answers is no kvmp")

    monkeypatch.setattr(server, "connect", refuse)
    with pytest.raises(
        ConnectError, match=r"no kvmp\..*'fail'; give it a server of its own at another kvmp.endpoint"
    ) as error:
        make(extra={"kvmp.on_unreachable": "fail"})
    assert "kvmp serve" not in str(error.value)


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_one_that_accepts_and_never_answers_holds_nobody_up(make, server, tmp_path, monkeypatch, family):
    """The real client, at a listener that is as silent as a stopped server: every hook of a start and of a request
    has returned while its hello is still unanswered."""
    kind = socket.SOCK_SEQPACKET if family == socket.AF_UNIX else socket.SOCK_STREAM
    with socket.socket(family, kind) as listener:
        listener.bind(f"{tmp_path}/silent.sock" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        name = listener.getsockname()
        endpoint = f"unix:{name}" if family == socket.AF_UNIX else f"tcp://127.0.0.1:{name[1]}"
        ended, real = threading.Event(), connecting.client_connect

        def connect(*args, **options):
            assert threading.current_thread() is not threading.main_thread()
            try:
                return real(endpoint, **options | {"timeout_ms": 60_000})
            finally:
                ended.set()

        monkeypatch.setattr(server, "connect", connect)
        engine = make(attach=False, extra={"kvmp.endpoint": endpoint})
        listener.settimeout(10)
        asking, _ = listener.accept()
        engine.prefill(fakes.request("r", PROMPT), [1, 2, 3, 4, 5])
        assert engine.ask(fakes.request("s", PROMPT)) == (0, False)
        assert not engine.scheduler.has_pending_push_work()
        assert not ended.is_set()
        asking.close()  # the hello ends
    assert ended.wait(10)


def test_fail_starts_beside_a_server_and_outlives_it(make, server):
    engine = make(extra={"kvmp.on_unreachable": "fail"})
    asked = [client for client in server.clients if client.part is None]
    assert [client.closed for client in asked[:2]] == [True, True], "each side's question is over"
    stored(engine)
    server.gone = True
    assert engine.ask(fakes.request("r", PROMPT)) == (0, False)


def test_spawn_starts_a_server_in_the_background(make, server, monkeypatch):
    server.gone, started = True, []

    def start(size, endpoint, *, until_pid, socket_dir):
        started.append((size, until_pid))
        server.gone = False
        return

    monkeypatch.setattr(background, "start", start)
    engine = make(extra=SPAWN)
    assert started == [("64MiB", os.getpid())]
    stored(engine)


def test_a_spawn_that_fails_is_not_tried_again_at_once(monkeypatch, caplog):
    tries = []

    def start(size, endpoint, *, until_pid, socket_dir):
        tries.append(size)
        raise KvmpError("no room")

    monkeypatch.setattr(background, "start", start)
    spawner = Spawner(ConnectorConfig(on_unreachable="spawn", spawn_size="1GiB"), logging.getLogger("test"))
    now = [0.0]
    monkeypatch.setattr("kvmp.vllm.unreachable.time.monotonic", lambda: now[0])
    begun = []
    for _ in range(300):  # half a second each
        before = len(tries)
        assert not spawner.start()
        begun += [now[0]] * (len(tries) - before)
        now[0] += 0.5
    pauses = [later - earlier for earlier, later in itertools.pairwise(begun)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60]
    assert caplog.text.count("no room") == 1


def test_nothing_is_spawned_unasked(monkeypatch):
    monkeypatch.setattr(background, "start", None)
    assert not Spawner(ConnectorConfig(), logging.getLogger("test")).start()
