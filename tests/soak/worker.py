"""One rank of a soak's engine: copies its part, block by block, and looks at every byte that it loads.

``python -m tests.soak.worker ENDPOINT TOKEN PART NAMESPACE DIGEST``; one JSON command a line, one JSON answer a line.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from kvmp.client import BlockLayout, Client
from kvmp.errors import KvmpError
from tests.soak.content import LAYOUT, PART_BYTES, part_of

CALL_MS = 2000
NOT_JOINED = 4


class Worker:
    def __init__(self, endpoint: str, token: int, part: int, namespace: int, digest: str):
        self._part = part
        self._client = Client.connect(endpoint, role="worker", engine_token=token, part=part, timeout_ms=CALL_MS)
        self._namespace = self._client.join(namespace, digest, LAYOUT, timeout_ms=CALL_MS)
        self._memory = np.zeros((1, PART_BYTES), np.uint8)
        row = [self._memory.ctypes.data, PART_BYTES, PART_BYTES, 0]
        self._layout = BlockLayout(np.array([row], dtype=np.int64), 1)
        self._block = np.zeros(1, np.int64)

    def store(self, lease: int, epoch: int, hashes: list[str], slots: list[int], words: list[int]) -> int:
        """Writes this part of each slot and commits all of them; how many were taken."""
        for block_hash, slot in zip(hashes, slots, strict=True):
            self._memory[0] = part_of(bytes.fromhex(block_hash), self._part)
            at = np.array([slot], np.uint32)
            self._client.store_blocks(self._layout, self._namespace, 0, self._block, at, 1, epoch)
        return self._client.commit(lease, np.array(slots, np.uint32), np.array(words, np.uint64), timeout_ms=CALL_MS)

    def abort(self, lease: int, slots: list[int], words: list[int]) -> int:
        return self._client.abort(lease, np.array(slots, np.uint32), np.array(words, np.uint64), timeout_ms=CALL_MS)

    def load(self, hashes: list[str], slots: list[int], words: list[int]) -> dict[str, list[str] | int]:
        """Loads each block; counts those that are whole, and names those whose bytes are another's."""
        ok, wrong = 0, []
        for block_hash, slot, word in zip(hashes, slots, words, strict=True):
            at, leased = np.array([slot], np.uint32), np.array([word], np.uint64)
            if self._client.load_blocks(self._layout, self._namespace, 0, self._block, at, leased, 1)[0]:
                ok += 1
                if not np.array_equal(self._memory[0], part_of(bytes.fromhex(block_hash), self._part)):
                    wrong.append(f"part {self._part} of block {block_hash} in slot {slot}, word {word:#x}")
        return {"ok": ok, "wrong": wrong}

    def close(self) -> None:
        self._client.close()


def main() -> None:
    endpoint, token, part, namespace, digest = sys.argv[1:]
    try:
        worker = Worker(endpoint, int(token), int(part), int(namespace), digest)
    except KvmpError:  # its server has gone meanwhile
        sys.exit(NOT_JOINED)
    verbs: dict[str, Callable[..., Any]] = {"store": worker.store, "abort": worker.abort, "load": worker.load}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"result": verbs[command.pop("do")](**command)}
        except Exception as error:  # the engine's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:  # its scheduler has gone meanwhile
            os._exit(0)
    worker.close()


if __name__ == "__main__":
    main()
