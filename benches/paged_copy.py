"""Store and load of CPU tensors through a real server, against a plain ``copy_`` of the same bytes in the same run,
with one thread and with all; and what `kvmp.verify = always` adds: the sums, made and checked, by one thread.

``python benches/paged_copy.py [--gib 1]``. The mapping is populated: each kind is run once before it is timed.
"""

import argparse
import json
import os
import secrets
import time
from functools import partial

import numpy as np
import torch

import kvmp
from kvmp.client import Client
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from kvmp.paged import PagedKV

BLOCK_BYTES = 2 << 20
ROUNDS = 3


def best_gbs(bytes_moved, work):
    """GB/s of the fastest of a few rounds, after one that is not timed."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return bytes_moved / min(seconds[1:]) / 1e9


def measure(scheduler, namespace, hashes, worker, joined, kv, ids, lease, cache, other):
    """GB/s of each kind of copy, alone and with every core; ends with a check of the bytes."""
    table, moved, slots = {}, cache.nbytes, lease.slots
    for threads in sorted({1, os.cpu_count()}):
        torch.set_num_threads(threads)
        store = partial(kv.store, worker, joined, ids, slots, threads=threads)
        load = partial(kv.load, worker, joined, ids, slots, lease.words, threads=threads)
        for name, work in {"copy_": lambda: other.copy_(cache), "store": store, "load": load}.items():
            table[f"{name}, {threads} threads"] = best_gbs(moved, work)
    made = worker.part_sums(joined, 0, slots)
    table["sums made"] = best_gbs(moved, lambda: worker.part_sums(joined, 0, slots))
    worker.commit(lease.lease_id, slots, lease.words, made, timeout_ms=10_000)
    # A commit gives each block another word, which a reader's lease has.
    hit = scheduler.lookup(namespace, hashes, timeout_ms=10_000)
    table["sums checked"] = best_gbs(moved, lambda: worker.check_sums(joined, 0, slots, hit.words()))
    assert not worker.check_sums(joined, 0, slots, hit.words()).any(), "a sum is not that of what was stored"
    cache.zero_()
    assert kv.load(worker, joined, ids, slots, hit.words()).all(), "a slot changed meanwhile"
    hit.release()
    assert torch.equal(cache, other), "what was loaded is not what was stored"
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of KV to move, GiB")
    gib = parser.parse_args().gib
    count = int(gib * (1 << 30)) // BLOCK_BYTES
    cache, other = torch.rand(count, BLOCK_BYTES // 4), torch.zeros(count, BLOCK_BYTES // 4)
    kv, ids = PagedKV({"layer": cache}), np.arange(count)
    with kvmp.launch(f"{int(gib * 2560) + 256}MiB") as server, Client.connect(server.endpoint) as scheduler:
        while scheduler.stats()["warming"]:
            time.sleep(0.01)
        part = PartSpec(bytes=(kv.block_bytes,), layout=kv.layout())
        ns = scheduler.open(NamespaceSpec(model="bench", facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,)))
        worker = Client.connect(server.endpoint, role="worker", engine_token=scheduler.engine_token, part=0)
        with worker:
            joined = worker.join(ns.id, ns.digest, json.dumps(kv.layout()))
            hashes = np.frombuffer(secrets.token_bytes(32 * count), np.uint8).reshape(-1, 32)
            lease = scheduler.reserve(ns, hashes, first_block=0)
            lease.handed_over()
            assert not lease.answers.any(), "a grant was refused: one engine may be writing half the arena at most"
            table = measure(scheduler, ns, hashes, worker, joined, kv, ids, lease, cache, other)
    print(f"{count} blocks of {BLOCK_BYTES >> 20} MiB, load average {os.getloadavg()[0]:.1f}")
    best = max(speed for name, speed in table.items() if name.startswith("copy_"))
    for name, speed in table.items():
        print(f"{name:18} {speed:6.2f} GB/s  {speed / best:.2f} x the better copy_")


if __name__ == "__main__":
    main()
