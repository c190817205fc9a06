"""Questions to the server: sent when a request arrives, harvested when vLLM asks, waited for a moment at most.

none -> pending -> answered{lease} -> handed to a load, or released; pending -> given up after the bound: a miss.
none -> none: there was no room for one more request; sent when vLLM asks again, until the bound: a miss.
"""

from __future__ import annotations

import time

from kvmp import errors
from kvmp.config import ConnectorConfig
from kvmp.vllm.link import Link
from kvmp.vllm.request_state import Answer, RequestState, hash_array
from kvmp.vllm.stats import KvmpStats

# The server drops a lease's pins after 60 s; an answer older than this is asked for again.
LEASE_USE_S = 50.0
# vLLM asks some ten microseconds after the request has come, and then only a whole step later: a question younger than
# this is waited for. A server that is awake has answered by then (DESIGN: 8,192 hashes in 300 us). Microseconds.
_MOMENT_US = 300
# And all such moments of a step. Those of questions sent together pass together; these need not.
_MOMENTS_US = 1000


class Lookups:
    """Answers how much of a request's prompt is in the cache."""

    def __init__(self, link: Link, options: ConnectorConfig, block_tokens: int, stats: KvmpStats, clock=time.monotonic):
        self._link = link
        self._options = options
        self._block_tokens = block_tokens
        self._stats = stats
        self._clock = clock
        self._moments_us = _MOMENTS_US

    def begin_step(self) -> None:
        """Gives the questions from here on moments of their own."""
        self._moments_us = _MOMENTS_US

    def send(self, state: RequestState) -> None:
        """Sends the request's lookup, if there is a server to ask and something to ask for."""
        namespace = self._link.namespace(state.adapter)
        if namespace is None:
            return
        state.move_to(namespace)
        self._submit(state)

    def hit_tokens(self, state: RequestState) -> int | None:
        """Tokens from the first on that are in the cache; None while the answer is under way within its bound."""
        namespace = self._link.namespace(state.adapter)
        if namespace is None:
            self._end_hold(state, self._clock())
            state.forget_lookup()
            return 0
        state.move_to(namespace)
        if self._outdated(state):
            state.forget_lookup()
        if state.answer is None and not self._harvest(state):
            return None
        return state.answer.tokens if state.answer is not None else 0

    def _asking_for(self, state: RequestState) -> tuple[int, bytes]:
        hashes = state.request.block_hashes
        return (len(hashes), bytes(hashes[-1])) if hashes else (0, b"")

    def _outdated(self, state: RequestState) -> bool:
        if state.pending is not None:
            return state.asked != self._asking_for(state)
        answer = state.answer
        if answer is None:
            return False
        return answer.asked != self._asking_for(state) or self._clock() - answer.at > LEASE_USE_S

    def _submit(self, state: RequestState) -> None:
        state.asked = self._asking_for(state)
        if not state.asked[0]:
            self._settle(state, None)
            return
        namespace = state.namespace
        try:
            hashes = hash_array(state.request.block_hashes)
            state.pending = namespace.session.client.submit_lookup(namespace.handle, hashes)
            self._stats.add("lookups")
        except errors.Busy:
            self._stats.add("busy")
        except BaseException as error:
            self._failed(state, error)

    def _harvest(self, state: RequestState) -> bool:
        """Looks for the answer; False while it may still come in time."""
        if state.pending is None:
            self._submit(state)
        if state.answer is not None:
            return True
        now = self._clock()
        if state.asked_at is None:
            state.asked_at = now
        lease = self._poll(state)
        if lease is not None:
            self._settle(state, lease)
        if state.answer is not None:
            return True
        held = now - state.asked_at
        if held < self._options.timeout_s:
            self._stats.raise_to("longest_hold_us", round(held * 1e6))
            return False
        self._stats.add("lookup_timeouts")
        if state.pending is None:
            # The server was not asked, so its silence says nothing of it.
            self._miss(state)
        else:
            self._give_up(state)
        return True

    def _poll(self, state: RequestState):
        if state.pending is None:
            return None
        begun = time.perf_counter_ns()
        try:
            return state.pending.poll(min(_MOMENT_US, self._moments_us))
        except BaseException as error:
            self._failed(state, error)
            return None
        finally:
            self._moments_us = max(0, self._moments_us - (time.perf_counter_ns() - begun) // 1000)

    def _failed(self, state: RequestState, error: BaseException) -> None:
        """A miss. That the server is lost is no fault to report here: the link warns of it, once."""
        self._give_up(state)
        if not isinstance(error, errors.ServerLost):
            raise error
        self._stats.add("errors")

    def _settle(self, state: RequestState, lease) -> None:
        now = self._clock()
        self._end_hold(state, now)
        state.pending = None
        tokens = self._usable_tokens(state, lease)
        if lease is not None and not tokens:
            lease.release()
            lease = None
        state.answer = Answer(tokens, lease, now, state.asked)
        state.stored_blocks, state.store_closed = tokens // self._block_tokens, False
        self._stats.add("hit_tokens", tokens)

    def _usable_tokens(self, state: RequestState, lease) -> int:
        if lease is None:
            return 0
        blocks = min(lease.tokens // self._block_tokens, len(lease.slots(0)), state.asked[0])
        return blocks * self._block_tokens

    def _give_up(self, state: RequestState) -> None:
        """Counts as a miss; nobody asks again before the server has answered a ping."""
        pending, state.pending = state.pending, None
        self._miss(state)
        if state.namespace is not None:
            self._link.mark_lost(state.namespace.session)
        if pending is not None:
            pending.abandon()

    def _miss(self, state: RequestState) -> None:
        now = self._clock()
        self._end_hold(state, now)
        state.answer = Answer(0, None, now, state.asked)

    def _end_hold(self, state: RequestState, now: float) -> None:
        if state.asked_at is not None:
            self._stats.add("lookup_wait_us", round((now - state.asked_at) * 1e6))
            state.asked_at = None
