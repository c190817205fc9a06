"""One engine through everything that can happen to its server, and a plain one beside it on the same cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import kvmp
from demo.engine import Engine, Output, Pending
from tests.engines.gate import Gate
from tests.engines.harness import BLOCK, NEW_TOKENS, Reference, forget, loaded_tokens, random_prompt, stats, until
from tests.engines.successors import Successors
from tests.engines.trap import Trap

BLOCKS = 8
TOKENS = BLOCKS * BLOCK + 5  # with the tokens generated no further block is filled
KEPT = random_prompt("kept over every restart", TOKENS)
BOUND_MS = 300
# What a step may wait for look-ups just sent is 1 ms; getting the core back on a busy machine is the rest.
MOMENTS_MS = 20
"""`kvmp.timeout_ms`; a machine full of other tests' engines misses the default now and then."""


@dataclass
class Life:
    successors: Successors
    server: kvmp.Server
    engine: Engine
    """Its copies stop at the gate, its requests pass the trap."""
    other: Engine
    gate: Gate
    trap: Trap

    # ---- the server

    def succeed(self) -> None:
        """The next server, after one that was killed; both engines attach to it by themselves."""
        before = self.attached()
        self.server.kill()
        self.server.close()
        self.server = self.successors.start()
        until(lambda: all(now > was for now, was in zip(self.attached(), before, strict=True)), "both attached anew")

    def attached(self) -> list[int]:
        """How often each engine has attached, its namespace open."""
        return [len(lines_of(engine, "kvmp: attached to")) for engine in (self.engine, self.other)]

    def assert_nothing_open(self) -> None:
        def closed() -> bool:
            now = stats(self.server)
            keys = ("blocks_writing", "blocks_quarantined", "read_leases", "write_leases", "pins")
            return not any(now[key] for key in keys)

        until(closed, "nothing pinned, Writing or quarantined")

    # ---- the engine

    def lines(self, text: str) -> list[str]:
        return lines_of(self.engine, text)

    def warnings(self) -> list[str]:
        """Kvmp's, from all of the engine's processes."""
        return [line for line in self.lines("kvmp") if "WARNING" in line or "ERROR" in line]

    def count(self, name: str) -> int:
        return self.engine.counters().get(f"kvmp_{name}", 0)

    def begin_store(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Pending:
        """A request whose prompt's store is part done."""
        self.gate.hold()
        pending = self.engine.submit(prompt, new_tokens)
        until(lambda: self.gate.passed("store"), "a block stored")
        assert self.gate.passed("store") < BLOCKS
        assert stats(self.server)["blocks_writing"] == BLOCKS
        return pending

    def begin_load(self, prompt: list[int]) -> Pending:
        """A request for what is stored, its load part done."""
        forget(self.engine)
        self.gate.hold()
        pending = self.engine.submit(prompt, NEW_TOKENS)
        until(lambda: self.gate.passed("load"), "a block loaded")
        assert not pending.done()
        return pending

    def ask(self, prompt: list[int]) -> tuple[Output, int]:
        """The answer, and how many of its tokens came from kvmp; the engine's own cache is empty before."""
        forget(self.engine)
        before = loaded_tokens(self.engine)
        (output,) = self.engine.generate([prompt], NEW_TOKENS)
        return output, loaded_tokens(self.engine) - before

    # ---- what must be true

    @contextmanager
    def one_loss(self) -> Iterator[None]:
        """The server is lost in it: one warning, and kvmp's calls waited moments at most on the engine's thread."""
        before = len(self.warnings())
        yield
        until(lambda: len(self.warnings()) > before, "a warning")
        self.assert_warned(before + 1)
        self.assert_never_waited()

    def assert_warned(self, times: int) -> None:
        assert len(self.warnings()) == times, self.warnings()

    def assert_never_waited(self) -> None:
        """By kvmp's own count, more than moments; nor was a request told to wait on when its bound had passed."""
        assert self.count("longest_step_wait_us") <= MOMENTS_MS * 1000
        assert self.count("longest_hold_us") <= BOUND_MS * 1000

    def assert_old_content_found(self, reference: Reference) -> None:
        """What an earlier server stored is a hit of this one, which has stored nothing itself."""
        warned = len(self.warnings())
        output, loaded = self.ask(KEPT)
        assert output.tokens == reference.tokens(KEPT)
        assert loaded == BLOCKS * BLOCK
        now = stats(self.server)
        assert now["recovered_blocks"] >= BLOCKS
        assert now["committed_blocks"] == 0
        self.assert_warned(warned)
        self.assert_nothing_open()


def lines_of(engine: Engine, text: str) -> list[str]:
    return [line for line in engine.log_path.read_text(errors="replace").splitlines() if text in line]
