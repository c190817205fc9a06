"""A process of an engine, to be killed: ``python tests/gpu/actor.py scheduler|worker JSON``.

It says what it does in lines of JSON. The scheduler opens the namespace, reserves slots and waits. The worker stores
into them over and over, each time other bytes, with `depth` copies under way, and commits nothing; SIGTERM ends it in
order, once its copies have ended.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvmp.client import Client
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from kvmp.paged import PagedKV

BLOCK_BYTES = 2 << 20
# A scheduler that nobody kills ends by itself. Seconds.
LIFE_S = 600


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def cache(blocks: int) -> tuple[torch.Tensor, PagedKV]:
    """Blocks of 2 MiB on the GPU."""
    tensor = torch.zeros(blocks, BLOCK_BYTES // 8, dtype=torch.int64, device="cuda")
    return tensor, PagedKV({"layer": tensor})


def spec(layout: dict[str, Any], model: str) -> NamespaceSpec:
    part = PartSpec(bytes=(BLOCK_BYTES,), layout=layout)
    return NamespaceSpec(model=model, facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,))


def hashes_of(model: str, blocks: int) -> NDArray[np.uint8]:
    """The blocks of a model's one prompt: uint8 (blocks, 32), the same for all who ask."""
    digests = [hashlib.sha256(f"{model} {block}".encode()).digest() for block in range(blocks)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def schedule(options: dict[str, Any]) -> None:
    """Reserves, and lives until it is killed."""
    with Client.connect(options["endpoint"]) as client:
        namespace = client.open(spec(options["layout"], options["model"]))
        hashes = hashes_of(options["model"], options["blocks"])
        lease = client.reserve(namespace, hashes, first_block=0, timeout_ms=10_000)
        lease.handed_over()
        assert not lease.answers.any()
        say(token=client.engine_token, namespace=namespace.id, digest=namespace.digest, slots=lease.slots.tolist())
        time.sleep(LIFE_S)


def work(options: dict[str, Any]) -> None:
    """Stores until it is killed or told to end. The loss of scheduler or server changes nothing: its copies go on."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    tensor, paged = cache(options["blocks"])
    client = Client.connect(options["endpoint"], role="worker", engine_token=options["token"], part=0, dma=True)
    joined = client.join(options["namespace"], options["digest"], json.dumps(paged.layout()))
    paged.prepare(client)
    while paged.lanes.registration()[0] < paged.lanes.registration()[1]:
        time.sleep(0.01)
    ids, slots, under_way = np.arange(options["blocks"]), np.array(options["slots"], np.uint32), deque()
    count = 0
    while not told:
        count += 1
        tensor.fill_(count)
        event = torch.cuda.current_stream().record_event()
        under_way.append(paged.begin_store(client, joined, ids, slots, after=event.cuda_event))
        if len(under_way) >= options["depth"]:
            under_way.popleft().wait()
            if count % 8 == 0:
                say(stored=count)
    for copy in under_way:
        copy.wait()
    client.close()


if __name__ == "__main__":
    {"scheduler": schedule, "worker": work}[sys.argv[1]](json.loads(sys.argv[2]))
