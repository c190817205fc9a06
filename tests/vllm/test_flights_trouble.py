"""Copies on a device in trouble: sleep, a session left, a shutdown, a device that fails, too many stores."""

import threading

import fakes
import pytest
from engine import WATCHDOG_S, stored, until
from fake_device import LOAD, STORE
from flying import BLOCKS, Flying

from kvmp import errors
from kvmp.vllm import jobs

DEVICE_ERROR = errors.DeviceError("an illegal memory access was encountered")


@pytest.fixture
def beside():
    """Runs calls that wait in threads of their own."""
    threads = []

    def run(call):
        threads.append(threading.Thread(target=call))
        threads[-1].start()
        return threads[-1]

    yield run
    for thread in threads:
        thread.join(WATCHDOG_S)
        assert not thread.is_alive()


def asleep(flying, beside):
    """A thread that puts the engine to sleep, once no copy may begin any more."""
    sleeper = beside(flying.engine.workers[0].unregister_kv_caches)
    until(lambda: flying.copier._flights._suspended, "sleep asked for")
    return sleeper


def test_sleep_waits_for_the_copies_under_way_and_lets_none_begin(flying, gpu, server, beside):
    flying.put_up(0)
    flying.load(0)
    sleeper = asleep(flying, beside)
    begun = len(gpu.begun)
    flying.load(1, begins=False)
    flying.put_up(1, begins=False)
    flying.until_done("load-1")
    until(lambda: (flying.step(), server.aborted == BLOCKS)[1], "the second store aborted")
    assert len(gpu.begun) == begun
    gpu.end(STORE)
    flying.look()
    assert sleeper.is_alive()
    gpu.end(LOAD)
    sleeper.join(WATCHDOG_S)
    assert not sleeper.is_alive()
    flying.engine.workers[0].restore_kv_caches()
    flying.until_done("load-0")
    flying.load(2)
    gpu.end(LOAD)
    flying.until_done("load-2")
    flying.settle()
    assert flying.done == {"load-0": 1, "load-1": 1, "load-2": 1}
    assert flying.failed == {"load-1"}
    assert len(server.blocks) == 2 * BLOCKS


def test_sleep_waits_for_no_answer_of_the_server(flying, gpu, beside, monkeypatch):
    flying.put_up(0)
    flying.put_up(1)
    answer, real = threading.Event(), fakes.FakeClient.commit
    monkeypatch.setattr(
        fakes.FakeClient, "commit", lambda *args, **kwargs: (answer.wait(WATCHDOG_S), real(*args, **kwargs))[1]
    )
    first, second = gpu.streams[STORE]

    class EndsBoth(threading.Event):
        def is_set(self):
            return super().is_set() and (second.over.set() or True)

    first.over = (
        EndsBoth()
    )  # Both have ended when the first is seen to have, so that one commit stands before the other.
    sleeper = asleep(flying, beside)
    gpu.rings = False
    gpu.end(STORE)
    sleeper.join(WATCHDOG_S)
    slept = not sleeper.is_alive()
    answer.set()
    gpu.end(STORE)
    flying.settle()
    assert slept


@pytest.mark.parametrize("how", ["left", "restarted"])
def test_copies_outlive_their_session_and_are_not_committed_in_the_next(flying, gpu, server, how):
    flying.put_up(0)
    flying.load(0)
    client = flying.client
    if how == "left":
        flying.engine.side._link.renew(frozenset({client.engine_token}))
    else:
        server.epoch += 1
    until(lambda: (flying.step(), client.closed and flying.client is not None)[1], "in the next session")
    flying.look()
    assert (gpu.held[client], flying.pinned, flying.done) == (2, BLOCKS, {})
    gpu.end(STORE)
    gpu.end(LOAD)
    flying.until_done("load-0")
    flying.settle()
    assert flying.done == {"load-0": 1}
    assert (len(server.blocks), flying.pinned) == (BLOCKS, 0)
    until(lambda: not gpu.held[client], "its holder entry let go")
    flying.put_up(1)
    gpu.end(STORE)
    flying.settle()
    assert len(server.blocks) == 2 * BLOCKS


def test_shutdown_waits_for_what_is_under_way(flying, gpu, server, beside):
    flying.load(0)
    flying.put_up(0)
    client, (load,) = flying.client, gpu.streams[LOAD]
    stop = beside(flying.engine.workers[0].shutdown)
    until(lambda: load.waits, "waited for")
    assert stop.is_alive()
    assert not client.closed
    gpu.end(LOAD)
    gpu.end(STORE)
    stop.join(WATCHDOG_S)
    flying.step()
    assert flying.done == {"load-0": 1}
    assert len(server.blocks) == 2 * BLOCKS
    assert client.closed


def test_a_device_that_fails_fails_loads_and_aborts_stores_and_is_told_of_once(flying, gpu, server, caplog_vllm):
    for number in range(2):
        flying.load(number)
        flying.put_up(number)
    gpu.fail(DEVICE_ERROR)  # No bell rings.
    flying.until_done("load-0", "load-1")
    flying.settle()
    assert flying.failed == {"load-0", "load-1"}
    assert (len(server.blocks), server.aborted, flying.pinned) == (BLOCKS, 2 * BLOCKS, 0)
    assert flying.engine.count("failed_load_blocks") == 2 * BLOCKS
    assert flying.engine.count("failed_store_blocks") == 2 * BLOCKS
    (warning,) = caplog_vllm.warnings()
    assert "illegal memory access" in warning
    gpu.at_once = True
    stored(flying.engine, "next", tokens=[7000 + token for token in range(18)])
    assert len(server.blocks) == 2 * BLOCKS


def test_a_device_that_takes_no_copy_is_told_of_once_a_direction(flying, gpu, server, caplog_vllm):
    gpu.refuses = {LOAD: [DEVICE_ERROR] * 2, STORE: [DEVICE_ERROR] * 2}
    for number in range(2):
        flying.load(number, begins=False)
        flying.put_up(number, begins=False)
    flying.until_done("load-0", "load-1")
    flying.settle()
    assert flying.failed == {"load-0", "load-1"}
    assert (len(server.blocks), server.aborted, flying.pinned) == (BLOCKS, 2 * BLOCKS, 0)
    assert flying.engine.count("errors") == 4
    assert len(caplog_vllm.warnings()) == 2


def test_the_bytes_of_stores_on_their_way_are_bounded_and_those_of_loads_are_not(gpu, make, server, monkeypatch):
    monkeypatch.setattr(jobs, "_STORE_BYTES", 0)
    monkeypatch.setattr(jobs, "CACHE_SHARE", 0.25)
    flying = Flying(gpu, make(paged=gpu.paged, num_blocks=100), server)  # a quarter: 25 blocks
    flying.keep()
    for number in range(6):
        flying.put_up(number)
    flying.put_up(6, begins=False)
    flying.put_up(7, begins=False)
    until(lambda: (flying.step(), server.aborted == 2 * BLOCKS)[1], "the stores too many aborted")
    assert gpu.under_way(STORE) == 6
    for number in range(8):
        flying.load(number)
    assert gpu.under_way(LOAD) == 8
    assert flying.engine.count("failed_store_blocks") == 2 * BLOCKS
    assert flying.pinned == 6 * BLOCKS
    gpu.end(STORE)
    until(lambda: (flying.step(), flying.pinned == 5 * BLOCKS)[1], "one ended")
    flying.put_up(8)
    assert gpu.under_way(STORE) == 6
    gpu.end_all()
    flying.settle()
    assert not flying.failed
    assert len(server.blocks) == 8 * BLOCKS


def test_of_a_large_cache_as_much_may_be_on_its_way_as_is_pinned():
    assert jobs.store_limit(0) == jobs.store_limit(1 << 30) == 1 << 30
    assert jobs.store_limit(64 << 30) == 48 << 30


def queue(limit):
    return jobs.Jobs(10, limit, fakes.SimpleNamespace(ring=lambda: None))


def store_of(job_id, blocks):
    return fakes.SimpleNamespace(job_id=job_id, block_ids=range(blocks))


def test_one_store_alone_fits_whatever_its_bytes():
    queued = queue(100)
    for job_id, blocks in ((1, 11), (2, 1)):
        queued.add_store(store_of(job_id, blocks), None)
    assert [queued.take().fits, queued.take().fits] == [True, False]


def test_a_store_that_is_only_to_be_aborted_takes_no_room_from_the_next():
    queued = queue(100)
    for job_id, blocks in ((1, 6), (2, 5), (3, 4)):
        queued.add_store(store_of(job_id, blocks), None)
    assert [queued.take().fits for _ in range(3)] == [True, False, True]
    queued.store_ended(store_of(2, 5), 0)
    queued.add_store(store_of(4, 1), None)
    assert not queued.take().fits
