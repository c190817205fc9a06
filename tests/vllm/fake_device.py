"""A device in one process: copies that end, fail and ring when a test says so, in order in each direction."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from types import SimpleNamespace

import fakes
from engine import WATCHDOG_S

LOAD, STORE = "load", "store"


class FakeDevice:
    """Two streams of work."""

    # What a worker logs of it.
    way, runs, device = "batch", 1, "fake:0"

    def __init__(self):
        self.streams: dict[str, list[Work]] = {LOAD: [], STORE: []}
        self.begun: list[Work] = []
        self.held: Counter[object] = Counter()  # copies by the client whose holder entry they keep locked
        self.dropped = 0  # copies let go before they had ended
        self.rings = True
        self.refuses: dict[str, list[BaseException | None]] = {}  # what the next ones to begin raise
        self.at_once = False  # work ends when it is begun
        self.moment = "start"
        self.events: dict[int, str] = {}  # event -> moment at which it was recorded
        self._handles = itertools.count(1)
        self._lock = threading.RLock()

    def paged(self, tensors, *, num_blocks=None):
        return DevicePaged(self, tensors, num_blocks)

    def record_event(self):
        handle = next(self._handles)
        self.events[handle] = self.moment
        return SimpleNamespace(cuda_event=handle)

    def begin(self, direction, client, work):
        refusals = self.refuses.get(direction)
        if refusals and (error := refusals.pop(0)) is not None:
            raise error
        with self._lock:
            self.begun.append(work)
            self.streams[direction].append(work)
            if self.at_once:
                self.end(direction)
        return DeviceCopy(self, client, work)

    def under_way(self, direction):
        return len(self.streams[direction])

    def end(self, direction, copies=1):
        """The first ones of a stream end."""
        for _ in range(copies):
            with self._lock:
                work = self.streams[direction].pop(0)
                work.move()
                work.over.set()
            if self.rings:
                work.bell.ring()

    def fail(self, error):
        """All that is under way fails, and rings no bell."""
        for stream in self.streams.values():
            while stream:
                work = stream.pop(0)
                work.error = error
                work.over.set()

    def end_all(self):
        """What is under way ends, and from now on whatever is begun."""
        with self._lock:
            self.at_once = True
            for direction, stream in self.streams.items():
                self.end(direction, len(stream))


class Work:
    """What a stream was given."""

    def __init__(self, move, check, after, bell):
        self.move, self.check, self.after, self.bell = move, check, after, bell
        self.over, self.error = threading.Event(), None
        self.looks, self.waits = 0, 0  # how often kvmp has looked, and waited


class DeviceCopy:
    """What kvmp holds of it: as Rust's `Transfer`, with what `PagedKV` puts around one."""

    def __init__(self, gpu, client, work):
        self._gpu, self._client, self._work = gpu, client, work
        gpu.held[client] += 1

    def __del__(self):
        self._gpu.held[self._client] -= 1
        self._gpu.dropped += not self._work.over.is_set()

    def has_ended(self):
        over = self._work.over.is_set()
        self._work.looks += 1
        if self._work.error is not None:
            raise self._work.error
        return over

    def wait(self):
        self._work.waits += 1
        assert self._work.over.wait(WATCHDOG_S), "a copy never ended"
        if self._work.error is not None:
            raise self._work.error

    def good(self):
        assert self._work.over.is_set(), "words checked before the end"
        return self._work.check()


class DevicePaged(fakes.FakePaged):
    """Paged memory on that device."""

    def __init__(self, gpu, tensors, num_blocks):
        super().__init__(tensors, num_blocks=num_blocks)
        self.lanes, self.runs, self.device = gpu, gpu.runs, gpu.device

    def record_event(self):
        return self.lanes.record_event()

    def begin_store(self, client, ns, block_ids, slots, *, server_epoch, after, bell):
        assert server_epoch == client.server_epoch
        work = Work(lambda: self.store(client, ns, block_ids, slots), None, after, bell)
        return self.lanes.begin(STORE, client, work)

    def begin_load(self, client, ns, block_ids, slots, words, *, after, bell):
        def check():
            return client.check(slots, words)

        work = Work(lambda: self.load(client, ns, block_ids, slots, words), check, after, bell)
        return self.lanes.begin(LOAD, client, work)
