"""One engine of the soak: a scheduler, this process, and a worker process for each part.

``python -m tests.soak.engine ENDPOINT SEED``. Prints its counters as a JSON line from time to time, for ever; a server
that is away is waited for. Ends with code 3 when it was given bytes of another block, with 1 when a worker is gone.
"""

import json
import random
import select
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from kvmp.client import Answer, Client, ReadLease, WriteLease
from kvmp.errors import KvmpError
from tests.soak.content import CHAINS, PARTS, chain, spec
from tests.soak.worker import CALL_MS, NOT_JOINED

WRONG_BYTES = 3
WORKER_GONE = 1
_ANSWER_S = 30.0
_SAY_S = 0.5
_BLOCKS = (4, 60)


class WorkerGoneError(Exception):
    """A worker was killed, or has been silent for very long: the engine ends, as vLLM does."""


class Rank:
    """The scheduler's line to one worker."""

    def __init__(self, client: Client, endpoint: str, part: int, namespace: Any):
        words = [endpoint, client.engine_token, part, namespace.id, namespace.digest]
        command = [sys.executable, "-m", "tests.soak.worker", *map(str, words)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, verb: str, **arguments: Any) -> None:
        try:
            self._process.stdin.write(json.dumps({"do": verb, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> Any:
        """What it says to the oldest question; ``KvmpError`` for what went wrong there."""
        if not select.select([self._process.stdout], [], [], _ANSWER_S)[0]:
            raise WorkerGoneError
        if not (line := self._process.stdout.readline()):
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise KvmpError(answer["error"])
        return answer["result"]

    def _ended(self) -> Exception:
        return KvmpError("it could not join") if self._process.wait() == NOT_JOINED else WorkerGoneError()

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Engine:
    """Stores and loads random chains in one session after the other."""

    def __init__(self, endpoint: str, seed: str):
        self._endpoint = endpoint
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._said = 0.0

    def run(self) -> None:
        while True:
            try:
                with ExitStack() as session:
                    self._session(session)
            except KvmpError:
                self.counts["lost sessions"] += 1
                self._say()
                time.sleep(0.02)

    def _session(self, session: ExitStack) -> None:
        client = session.enter_context(Client.connect(self._endpoint, timeout_ms=CALL_MS))
        namespace = client.open(spec(), timeout_ms=CALL_MS)
        ranks = []
        for part in range(PARTS):
            ranks.append(Rank(client, self._endpoint, part, namespace))
            session.callback(ranks[-1].close)
        while True:
            self._request(client, namespace, ranks)
            self._say()

    def _request(self, client: Client, namespace: Any, ranks: list[Rank]) -> None:
        hashes = chain(self._random.randrange(CHAINS), self._random.randint(*_BLOCKS))
        if self._random.random() < 0.1:  # asked, and given up on
            client.submit_lookup(namespace, hashes).abandon()
            self.counts["abandoned lookups"] += 1
        with client.lookup(namespace, hashes, timeout_ms=CALL_MS) as lease:
            hit = lease.blocks()
            self._load(lease, hashes[:hit], ranks)
        if hit < len(hashes):
            self._store(client, namespace, hashes, hit, ranks)

    def _load(self, lease: ReadLease, hashes: Any, ranks: list[Rank]) -> None:
        named = [bytes(each).hex() for each in hashes]
        for rank in ranks:
            rank.ask("load", hashes=named, slots=lease.slots().tolist(), words=lease.words().tolist())
        for loaded in self._answers(ranks):
            self.counts["loaded parts"] += loaded["ok"]
            for wrong in loaded["wrong"]:
                print(f"WRONG BYTES: {wrong}", file=sys.stderr, flush=True)
                sys.exit(WRONG_BYTES)

    def _store(self, client: Client, namespace: Any, hashes: Any, hit: int, ranks: list[Rank]) -> None:
        parent = bytes(hashes[hit - 1]) if hit else None
        asked = hashes[hit:]
        lease = client.reserve(namespace, asked, first_block=hit, parent=parent, timeout_ms=CALL_MS)
        if self._random.random() < 0.05:
            lease.cancel()
            self.counts["cancelled"] += 1
            return
        self._write(lease, asked, ranks)

    def _write(self, lease: WriteLease, asked: Any, ranks: list[Rank]) -> None:
        granted = np.flatnonzero(lease.answers == Answer.GRANTED)
        if not granted.size:
            return
        lease.handed_over()
        slots, words = lease.slots[granted].tolist(), lease.words[granted].tolist()
        given_up = self._random.randrange(PARTS) if self._random.random() < 0.05 else None
        for part, rank in enumerate(ranks):
            if part == given_up:
                rank.ask("abort", lease=lease.lease_id, slots=slots, words=words)
            else:
                named = [bytes(asked[index]).hex() for index in granted]
                epoch = lease.server_epoch
                rank.ask("store", lease=lease.lease_id, epoch=epoch, hashes=named, slots=slots, words=words)
        taken = list(self._answers(ranks))
        self.counts["aborted parts" if given_up is not None else "stored parts"] += sum(taken)

    @staticmethod
    def _answers(ranks: list[Rank]) -> list[Any]:
        """Every rank's answer, all of them taken in before the first error is raised."""
        answers: list[Any] = []
        failed: KvmpError | None = None
        for rank in ranks:
            try:
                answers.append(rank.answer())
            except KvmpError as error:
                failed = error
        if failed is not None:
            raise failed
        return answers

    def _say(self) -> None:
        if time.monotonic() - self._said > _SAY_S:
            self._said = time.monotonic()
            print(json.dumps(self.counts), flush=True)


def main() -> None:
    try:
        Engine(*sys.argv[1:]).run()
    except WorkerGoneError:
        sys.exit(WORKER_GONE)


if __name__ == "__main__":
    main()
