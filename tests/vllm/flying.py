"""An engine of one rank on a fake device, its stores and loads under way until a test ends them."""

from __future__ import annotations

from collections import Counter

import fakes
from engine import PROMPT, stored, until
from fake_device import LOAD, STORE

TOKENS = 16  # of a prompt, those in full blocks
BLOCKS = TOKENS // fakes.BLOCK


class Flying:
    """Begins jobs, and keeps what was reported of them."""

    def __init__(self, gpu, engine, server):
        self.gpu, self.engine, self.server = gpu, engine, server
        self.done: Counter[str] = Counter()
        self.failed: set[str] = set()
        self._tables = iter(range(1, 1000, 5))

    @property
    def copier(self):
        return self.engine.workers[0]._worker._running_copier()

    @property
    def client(self):
        """The worker's client of now."""
        return self.copier._membership.client

    @property
    def pinned(self):
        return self.engine.pool.pinned

    @property
    def open_leases(self):
        return self.server.leases - self.server.released

    def table(self):
        first = next(self._tables)
        return list(range(first, first + 5))

    def keep(self):
        """Has the prompt stored, for loads to find."""
        self.gpu.at_once = True
        stored(self.engine, "kept", table=self.table())
        self.gpu.at_once = False

    def step(self):
        """An idle step."""
        done, failed = self.engine.run_step(fakes.step({}))
        self.done.update(done)
        self.failed |= failed

    def put_up(self, number, begins=True):
        """A store of a prompt of its own; returns when its copy is under way."""
        req = fakes.request(f"store-{number}", [1000 * (number + 1) + token for token in PROMPT])
        before, table = len(self.gpu.begun), self.table()
        assert self.engine.ask(req) == (0, False)
        self.engine.scheduler.update_state_after_alloc(req, fakes.blocks_of(table), 0)
        done, failed = self.engine.prefill(req, table)
        self.done.update(done)
        self.failed |= failed
        self.step()
        until(lambda: not begins or len(self.gpu.begun) > before, "a store under way")

    def load(self, number, begins=True):
        """A load of the prompt that was kept; returns when its copy is under way."""
        req, before, table = fakes.request(f"load-{number}", PROMPT), len(self.gpu.begun), self.table()
        self.engine.tables[req.request_id] = table
        assert self.engine.ask(req) == (TOKENS, True)
        self.engine.scheduler.update_state_after_alloc(req, fakes.blocks_of(table), TOKENS)
        self.step()
        until(lambda: not begins or len(self.gpu.begun) > before, "a load under way")
        return req

    def look(self):
        """The copy thread has heard the scheduler, gone over all that is under way, and its reports were taken in."""
        self.step()
        works = [*self.gpu.streams[LOAD], *self.gpu.streams[STORE]]
        assert works
        # The first look may be of a turn that began before this call; the second ends that turn.
        seen = {work: work.looks + 2 for work in works}

        def looked():
            self.copier._bell.ring()
            return all(work.looks >= looks for work, looks in seen.items())

        until(looked, "the copy thread looks")
        self.step()

    def until_done(self, *req_ids):
        until(lambda: (self.step(), set(req_ids) <= set(self.done))[1], f"{req_ids} reported")

    def settle(self):
        """Steps until nothing is pending."""
        until(lambda: (self.step(), not self.engine.scheduler.has_pending_push_work())[1], "nothing pending")
