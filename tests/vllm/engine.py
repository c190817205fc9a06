"""One engine around the real connector: a scheduler side and its workers, stepped by hand on a fake server."""

from __future__ import annotations

import pickle
import threading
import time

import fakes
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvmp.vllm import compat, connector
from kvmp.vllm.metadata import StepMeta

WATCHDOG_S = 10.0
PROMPT = list(range(18))  # four full blocks and a half


def until(condition, what: str) -> None:
    """Waits for a background thread to make `condition` true."""
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        threading.Event().wait(0.002)


def results_of(worker):
    """What a worker has loaded, asked for as this vLLM's runner does: (ended, failed, blocks of failed loads)."""
    if compat.TransferResults is None:
        ended, failed = worker.get_finished(set())[1] or set(), set()
    else:
        results = worker.get_transfer_results(set())
        ended, failed = results.finished_recving, results.failed_recving
    return ended, failed, worker.get_block_ids_with_load_errors()


class Engine:
    """`ranks` workers with tensors of their own, of a model with so many KV heads (None: nobody knows)."""

    def __init__(
        self,
        server,
        folder,
        monkeypatch,
        *,
        ranks=1,
        heads=None,
        extra=None,
        num_blocks=100,
        attach=True,
        role="kv_both",
        paged=fakes.FakePaged,
        batches=1,
    ):
        self.server = server
        monkeypatch.setattr("kvmp.paged.PagedKV", paged)
        monkeypatch.setattr("kvmp.vllm.connecting.client_connect", server.connect)
        monkeypatch.setattr(compat, "kernel_packing", lambda config, spec: "test")
        self.config = fakes.engine_config(str(folder), tp=ranks, extra=extra, role=role)
        self.config.max_concurrent_batches = batches
        if heads is not None:
            self.config.model_config.get_total_num_kv_heads = lambda: heads
        cache = fakes.cache_config(num_blocks)
        self.tensors, self.workers = [], []
        for rank in range(ranks):
            monkeypatch.setattr(compat, "rank_in_engine", lambda rank=rank: (0, rank))
            worker = connector.KvmpConnector(self.config, KVConnectorRole.WORKER, cache)
            tensor = torch.zeros((num_blocks, fakes.BLOCK, 2))
            worker.register_kv_caches({"layer.0": tensor})
            self.tensors.append(tensor)
            self.workers.append(worker)
        self.scheduler = connector.KvmpConnector(self.config, KVConnectorRole.SCHEDULER, cache)
        self.pool = fakes.FakePool(num_blocks)
        self.scheduler.bind_gpu_block_pool(self.pool)
        parts = {(0, rank): worker.get_handshake_metadata() for rank, worker in enumerate(self.workers)}
        self.scheduler.set_xfer_handshake_metadata_pp_aware(pickle.loads(pickle.dumps(parts)))
        for worker in self.workers:
            # The first step says so; tests look at workers before there is one.
            worker._worker.bind(StepMeta(shares=self.side._shares))
        self.recv, self.failed, self.tables = {}, set(), {}
        if attach:
            until(self.attached, "attached")

    @property
    def side(self):
        return self.scheduler._scheduler

    def attached(self) -> bool:
        return self.side._link is not None and self.side._link.namespace() is not None

    def count(self, name: str) -> int:
        return sum(c._stats.data.get(name, 0) for c in (self.scheduler, *self.workers))

    def run_step(self, scheduler_output):
        """One step as vLLM makes it: metadata to every rank, their reports aggregated and taken in."""
        meta = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(scheduler_output)))
        report, done, invalid = None, set(), set()
        for worker in self.workers:
            worker.handle_preemptions(meta)
            worker.bind_connector_metadata(meta)
            worker.start_load_kv(None)
            worker.wait_for_save()
            ended, failed, bad_blocks = results_of(worker)
            for req_id in ended:
                self.recv[req_id] = self.recv.get(req_id, 0) + 1
                assert self.recv[req_id] <= len(self.workers), "a load was reported twice by a rank"
                if self.recv[req_id] == len(self.workers):
                    done.add(req_id)
                    del self.recv[req_id]
            # vLLM 0.29 is told of blocks only, and finds their requests itself.
            self.failed |= failed | {req_id for req_id, table in self.tables.items() if bad_blocks & set(table)}
            invalid |= bad_blocks
            part = pickle.loads(pickle.dumps(worker.build_connector_worker_meta()))
            report = part if report is None else report.aggregate(part) if part is not None else report
            worker.clear_connector_metadata()
        failed, self.failed = self.failed & done, self.failed - done
        self.scheduler.update_connector_output(fakes.output(done, failed, report, invalid))
        return done, failed

    def drain(self) -> None:
        """Steps without requests until nothing is pending, as vLLM's idle loop does."""

        def idle():
            self.run_step(fakes.step({}))
            return not self.scheduler.has_pending_push_work()

        until(idle, "nothing pending")

    def prefill(self, req, table, computed=0):
        """Computes the whole prompt in one step, with KV that says its block's content."""
        for tensor in self.tensors:
            for i, block in enumerate(table):
                tensor[block] = float(hash(req.block_hashes[i]) % 1000) if i < len(req.block_hashes) else 0.0
        return self.run_step(
            fakes.step({req.request_id: table}, new=[(req.request_id, computed, req.num_tokens - computed)])
        )

    def ask(self, req, local=0):
        """Asks until there is an answer."""
        answers = []

        def answered():
            answers.append(self.scheduler.get_num_new_matched_tokens(req, local))
            return answers[-1][0] is not None

        until(answered, "an answer to a lookup")
        return answers[-1]

    def load(self, req, table, tokens):
        """Admits the request with this load and steps until every rank has reported it."""
        self.tables[req.request_id] = table
        self.scheduler.update_state_after_alloc(req, fakes.blocks_of(table), tokens)
        results = []

        def ended():
            results.append(self.run_step(fakes.step({})))
            return req.request_id in results[-1][0]

        until(ended, "the load's end")
        return req.request_id not in results[-1][1]

    def close(self):
        for part in (self.scheduler, *self.workers):
            part.shutdown()


def stored(engine, req_id="first", table=(1, 2, 3, 4, 5), tokens=PROMPT):
    """A request that found nothing, computed and put up for storing; its stores have ended."""
    req = fakes.request(req_id, tokens)
    engine.scheduler.on_new_request(req)
    assert engine.ask(req) == (0, False)
    engine.scheduler.update_state_after_alloc(req, fakes.blocks_of(list(table)), 0)
    engine.prefill(req, list(table))
    engine.drain()
    return req
