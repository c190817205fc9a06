"""The connector's behaviour at vLLM's hooks, on a fake server."""

import contextlib

import fakes
import pytest
import torch
from engine import PROMPT, results_of, stored, until

from kvmp.vllm import compat
from kvmp.vllm.worker import WorkerSide


@pytest.mark.parametrize("ranks", [1, 2])
def test_second_engine_loads_what_the_first_stored(make, server, ranks):
    first = make(ranks=ranks)
    stored(first)
    assert len(server.blocks) == 4
    assert first.pool.pinned == 0
    second = make(ranks=ranks)
    req = fakes.request("again", PROMPT)
    second.scheduler.on_new_request(req)
    assert second.ask(req) == (16, True)
    assert second.load(req, [11, 12, 13, 14, 15], 16)
    for mine, theirs in zip(second.tensors, first.tensors, strict=True):
        assert torch.equal(mine[11:15], theirs[1:5])
        assert not mine[15].any()
    assert second.count("loaded_tokens") == 16
    assert server.released == server.leases


def test_resident_blocks_are_not_loaded(make):
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT)
    second.scheduler.on_new_request(req)
    assert second.ask(req, 8) == (8, True)
    assert second.load(req, [21, 22, 23, 24, 25], 8)
    assert not second.tensors[0][21:23].any()
    assert second.tensors[0][23:25].any()


def test_full_prompt_hit_is_asynchronous_and_block_aligned(make):
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT[:16])
    assert second.ask(req) == (16, True)
    assert second.ask(req, 16) == (0, False)


def test_nothing_is_lost_of_a_lease_that_is_not_used(make, server):
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT)
    second.ask(req, 16)
    second.scheduler.update_state_after_alloc(req, fakes.blocks_of([1]), 0)
    aborted = fakes.request("aborted", PROMPT)
    second.ask(aborted)
    second.scheduler.request_finished(aborted, [])
    assert server.released == server.leases


def test_no_answer_is_a_miss_after_the_bound(make, server):
    engine = make(extra={"kvmp.timeout_ms": 20})
    server.silent = True
    req = fakes.request("r", PROMPT)
    engine.scheduler.on_new_request(req)
    assert engine.scheduler.get_num_new_matched_tokens(req, 0) == (None, False)
    assert engine.ask(req) == (0, False)
    assert engine.count("lookup_timeouts") == 1
    # Until a ping is answered, nobody waits and nothing is sent.
    other = fakes.request("s", PROMPT)
    engine.scheduler.on_new_request(other)
    assert engine.scheduler.get_num_new_matched_tokens(other, 0) == (0, False)
    assert engine.count("lookups") == 1
    server.silent = False
    until(engine.attached, "back after a ping")


def test_failed_load_is_reported_once_and_never_asked_again(make, server):
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT)
    assert second.ask(req) == (16, True)
    server.word_of = {slot: word + 1 for slot, word in server.word_of.items()}
    assert not second.load(req, [11, 12, 13, 14, 15], 16)
    assert second.ask(req) == (0, False)
    assert second.count("failed_load_blocks") == 4
    assert second.config.kv_transfer_config.kv_load_failure_policy == "recompute"


@pytest.mark.parametrize(("local", "tokens"), [(0, 14), (2, 12)])
def test_a_load_of_a_part_of_a_block_fails_and_is_reported(make, server, local, tokens):
    """Nothing of vLLM's asks for one; what it would take for loaded is never less than what was."""
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT)
    second.ask(req, local)
    assert not second.load(req, [11, 12, 13, 14, 15], tokens)
    assert server.released == server.leases


def test_what_a_failed_load_missed_is_stored_once_it_is_computed(make, server):
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT)
    assert second.ask(req) == (16, True)
    server.word_of = {slot: word + 1 for slot, word in server.word_of.items()}
    server.blocks.clear()
    assert not second.load(req, [11, 12, 13, 14, 15], 16)
    second.scheduler.update_state_after_alloc(req, fakes.blocks_of([11, 12, 13, 14, 15]), 0)
    second.prefill(req, [11, 12, 13, 14, 15])
    second.drain()
    assert len(server.blocks) == 4


def test_worker_that_cannot_join_reports_failure(make, server):
    stored(make())
    second = make(ranks=1)
    req = fakes.request("again", PROMPT)
    assert second.ask(req) == (16, True)
    server.gone = True
    assert not second.load(req, [11, 12, 13, 14, 15], 16)
    second.drain()


def test_blocks_that_one_rank_did_not_load_are_remembered_until_the_load_ends(make, server):
    """vLLM 0.29 says at once which blocks a rank did not load, and only later that the other rank has ended too."""
    stored(make(ranks=2))
    second = make(ranks=2)
    req = fakes.request("again", PROMPT)
    assert second.ask(req) == (16, True)
    second.scheduler.update_state_after_alloc(req, fakes.blocks_of([11, 12, 13, 14, 15]), 16)
    second.scheduler.update_connector_output(fakes.output(invalid={12}))
    assert second.scheduler.has_pending_push_work()
    second.scheduler.update_connector_output(fakes.output(recv={"again"}))
    assert second.count("failed_load_blocks") == 4
    assert second.ask(req) == (0, False)


def test_load_of_an_aborted_request_is_still_reported(make):
    stored(make())
    second = make()
    req = fakes.request("again", PROMPT)
    assert second.ask(req) == (16, True)
    second.scheduler.update_state_after_alloc(req, fakes.blocks_of([11, 12, 13, 14, 15]), 16)
    second.scheduler.request_finished(req, [])
    assert second.scheduler.has_pending_push_work()
    second.drain()
    assert second.server.released == second.server.leases


def test_decode_blocks_are_stored_unless_switched_off(make, server):
    for save, expected in ((True, 2), (False, 1)):
        server.blocks.clear()
        engine = make(extra={"kvmp.save_decode": save})
        req = stored(engine, f"r{save}", (1, 2), PROMPT[:6])
        tokens = PROMPT[:8]
        req.block_hashes, req.num_tokens = fakes.block_hashes(tokens), 8
        engine.run_step(fakes.step({req.request_id: [1, 2]}, cached=[(req.request_id, 7, 1)]))
        engine.drain()
        assert len(server.blocks) == expected


def test_a_block_without_a_hash_or_not_yet_computed_is_not_stored(make, server):
    engine = make()
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.run_step(fakes.step({"r": [1, 2, 3, 4, 5]}, new=[("r", 0, 7)]))
    engine.drain()
    assert len(server.blocks) == 1
    engine.run_step(fakes.step({"r": [1, 2, 3, 4, 5]}, cached=[("r", 7, 11)]))
    engine.drain()
    assert len(server.blocks) == 4
    assert server.reserves == [(0, 1), (1, 3)]


def test_blocks_are_pinned_until_every_rank_has_reported(make):
    engine = make(ranks=2)
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.prefill(req, [1, 2, 3, 4, 5])
    engine.scheduler.request_finished(req, [1, 2, 3, 4, 5])
    assert engine.pool.pinned == 4
    assert engine.scheduler.has_pending_push_work()
    assert engine.scheduler.has_pending_block_frees()
    engine.drain()
    assert engine.pool.pinned == 0
    assert engine.count("stored_blocks") == 4


def test_hit_blocks_are_not_reserved_again(make, server):
    stored(make())
    second = make()
    server.reserves.clear()
    req = fakes.request("again", [*PROMPT, 1, 2, 3])
    assert second.ask(req) == (16, True)
    assert second.load(req, [11, 12, 13, 14, 15, 16], 16)
    second.run_step(fakes.step({"again": [11, 12, 13, 14, 15, 16]}, cached=[("again", 16, 5)]))
    assert server.reserves == [(4, 1)]


def test_no_space_unpins_and_is_not_tried_each_step(make, server):
    server.capacity = 2
    engine = make()
    stored(engine)
    assert len(server.blocks) == 2
    assert engine.pool.pinned == 0
    tries = len(server.reserves)
    engine.run_step(fakes.step({"first": [1, 2, 3, 4, 5]}, cached=[("first", 18, 1)]))
    assert len(server.reserves) == tries
    assert engine.count("refused_store_blocks") == 2


def test_silent_server_unpins_after_the_bound(make, server):
    engine = make(extra={"kvmp.timeout_ms": 20})
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    server.silent = True
    engine.prefill(req, [1, 2, 3, 4, 5])
    assert engine.pool.pinned == 4
    engine.drain()
    assert engine.pool.pinned == 0
    assert engine.count("reserve_timeouts") == 1


def test_the_null_block_is_never_stored(make, server):
    engine = make()
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.run_step(fakes.step({"r": [1, 0, 3, 4, 5]}, new=[("r", 0, 18)]))
    engine.drain()
    assert len(server.blocks) == 1


def test_store_of_another_server_epoch_is_not_begun(make, server):
    engine = make()
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.prefill(req, [1, 2, 3, 4, 5])
    meta = engine.scheduler.build_connector_meta(fakes.step({}))
    assert len(meta.stores) == 1
    server.epoch = 2
    worker = engine.workers[0]
    worker.bind_connector_metadata(meta)
    worker.wait_for_save()
    reports = []

    def reported():
        results_of(worker)
        reports.append(worker.build_connector_worker_meta())
        return reports[-1] is not None

    until(reported, "the store's report")
    assert reports[-1].stores == {meta.stores[0].job_id: {0: 0}}
    assert not server.arena
    engine.scheduler.update_connector_output(fakes.output(report=reports[-1]))
    assert engine.pool.pinned == 0


def test_a_worker_that_missed_a_bound_goes_on_after_a_ping(make, server):
    engine = make()
    server.late = {"commit"}
    stored(engine)
    assert not server.blocks
    assert engine.count("failed_store_blocks") == 4
    server.late = set()
    other = fakes.request("other", PROMPT[1:])
    engine.ask(other)
    engine.prefill(other, [6, 7, 8, 9, 10])
    engine.drain()
    assert len(server.blocks) == 4


def test_an_idle_worker_leaves_a_server_that_is_gone(make, server):
    engine = make()
    stored(engine)
    membership = engine.workers[0]._worker._copier._membership
    assert membership.joined
    server.gone = True
    until(lambda: not membership.joined, "the worker left")


def test_server_restart_is_followed(make, server):
    engine = make()
    stored(engine)
    server.epoch, server.segment = 2, "segment-2"
    server.blocks.clear()
    until(lambda: engine.attached() and engine.side._link.session.server_epoch == 2, "attached again")
    stored(engine, "second")
    assert len(server.blocks) == 4


def test_engine_starts_without_a_server_and_attaches_when_one_comes(make, server, caplog_vllm):
    server.gone = True
    engine = make(attach=False, extra={"kvmp.endpoint": "unix:/nowhere"})
    req = fakes.request("r", PROMPT)
    engine.scheduler.on_new_request(req)
    assert engine.scheduler.get_num_new_matched_tokens(req, 0) == (0, False)
    until(lambda: caplog_vllm.warnings(), "the warning")
    engine.prefill(req, [1, 2, 3, 4, 5])
    assert not engine.scheduler.has_pending_push_work()
    server.gone = False
    until(engine.attached, "attached")
    (warning,) = caplog_vllm.warnings()
    assert "unix:/nowhere" in warning
    assert "kvmp serve --size" in warning


def test_reset_goes_on_under_a_fresh_salt(make, server):
    engine = make()
    req = stored(engine)
    assert engine.scheduler.reset_cache() is True
    until(engine.attached, "a new namespace")
    assert len(server.digests) == 2
    assert engine.ask(fakes.request("again", PROMPT)) == (0, False)
    # What was computed before the reset is not stored after it.
    engine.run_step(fakes.step({"first": [1, 2, 3, 4, 5]}, cached=[("first", 16, 4)]))
    engine.drain()
    assert {digest for digest, _ in server.blocks} == {server.digests[0]}
    engine.ask(req)
    engine.prefill(req, [1, 2, 3, 4, 5])
    engine.drain()
    assert {digest for digest, _ in server.blocks} == set(server.digests)


def test_stores_handed_over_before_a_reset_are_aborted(make, server):
    engine = make()
    req = fakes.request("r", PROMPT)
    engine.ask(req)
    engine.prefill(req, [1, 2, 3, 4, 5])
    meta = engine.scheduler.build_connector_meta(fakes.step({}))
    engine.workers[0].bind_connector_metadata(meta)
    engine.scheduler.reset_cache()
    engine.workers[0]._worker._running_copier().cancel(frozenset(), engine.side._stores.void_below)
    engine.drain()
    assert not server.blocks
    assert server.aborted == 4
    assert engine.pool.pinned == 0


def test_adapter_has_a_namespace_of_its_own(make, server, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    engine = make()
    stored(engine)
    lora = fakes.SimpleNamespace(lora_int_id=1, lora_name="a", lora_path=str(folder), load_inplace=False)
    req = fakes.request("r", PROMPT, lora_request=lora)
    assert engine.ask(req) == (0, False)
    until(lambda: len(server.digests) == 2, "the adapter's namespace")
    assert engine.ask(req) == (0, False)
    missing = fakes.SimpleNamespace(lora_int_id=2, lora_name="b", lora_path="/nowhere", load_inplace=False)
    assert engine.ask(fakes.request("s", PROMPT, lora_request=missing)) == (0, False)
    engine.run_step(fakes.step({"s": [1, 2, 3, 4, 5]}, new=[("s", 0, 18)]))
    assert not engine.scheduler.has_pending_push_work()


def test_prompt_logprobs_requests_do_not_read(make, server):
    stored(make())
    engine = make()
    req = fakes.request("r", PROMPT, skip_reading_prefix_cache=True)
    engine.scheduler.on_new_request(req)
    assert engine.ask(req) == (0, False)
    assert engine.count("lookups") == 0


def test_request_without_a_lookup_or_with_an_old_lease_sends_one(make, server):
    stored(make())
    engine = make()
    now = [0.0]
    engine.side._lookups._clock = lambda: now[0]
    req = fakes.request("r", PROMPT)
    assert engine.ask(req) == (16, True)
    assert engine.count("lookups") == 1
    now[0] = 51.0
    assert engine.ask(req) == (16, True)
    assert engine.count("lookups") == 2
    req.block_hashes = req.block_hashes[:2]
    assert engine.ask(req) == (8, True)
    assert engine.count("lookups") == 3


def test_preempted_request_asks_again(make, server):
    engine = make()
    req = stored(engine)
    assert engine.ask(req) == (16, True)
    engine.scheduler.request_finished(req, [])


def test_kv_on_cuda_switches_off_with_one_line(make, monkeypatch, caplog_vllm):
    register = WorkerSide.register
    on_cuda = fakes.SimpleNamespace(device=fakes.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(WorkerSide, "register", lambda side, kv_caches: register(side, {"layer.0": on_cuda}))
    engine = make(attach=False)
    (warning,) = caplog_vllm.warnings()
    assert "the KV cache is on cuda; kvmp copies tensors of the CPU or of one CUDA device" in warning
    req = fakes.request("r", PROMPT)
    engine.scheduler.on_new_request(req)
    assert engine.ask(req) == (0, False)
    engine.prefill(req, [1, 2, 3, 4, 5])
    assert not engine.scheduler.has_pending_push_work()


@pytest.mark.parametrize(("release", "off"), [((0, 32), True), ((0, 33), False)])
def test_a_cache_on_cuda_that_may_sleep_unannounced_is_left_alone(make, monkeypatch, caplog_vllm, release, off):
    register = WorkerSide.register
    monkeypatch.setattr(compat, "VERSION", release)
    monkeypatch.setattr(compat, "_is_cuda", lambda: True)
    reasons = []

    def on_cuda(side, kv_caches):
        side._vllm_config.model_config.enable_sleep_mode = True
        tensor = fakes.SimpleNamespace(device=fakes.SimpleNamespace(type="cuda"))
        with contextlib.suppress(TypeError):  # of a tensor that is none, where it is looked at more closely
            register(side, {"layer.0": tensor})
        reasons.append(side._off)

    monkeypatch.setattr(WorkerSide, "register", on_cuda)
    make(attach=False)
    assert ["enable_sleep_mode" in reason for reason in reasons] == [off]


def test_unknown_layer_spec_or_several_groups_switch_off(make, monkeypatch, caplog_vllm):
    class Foreign:
        pass

    for cache, text in ((fakes.cache_config(spec=Foreign()), "Foreign"), (fakes.cache_config(groups=2), "2 KV-cache")):
        caplog_vllm.clear()
        monkeypatch.setattr(fakes, "cache_config", lambda *args, cache=cache: cache)
        engine = make(attach=False)
        (warning,) = caplog_vllm.warnings()
        assert text in warning
        assert engine.ask(fakes.request("r", PROMPT)) == (0, False)


def test_stats_merge_and_cross_processes(make):
    import pickle

    engine = make(ranks=2)
    stored(engine)
    stats = engine.scheduler.get_kv_connector_stats()
    again = type(engine.scheduler).build_kv_connector_stats(pickle.loads(pickle.dumps(stats)).data)
    merged = again.aggregate(stats)
    assert merged.reduce()["stored_blocks"] == 8
    assert all(isinstance(value, int) for value in merged.data.values())
