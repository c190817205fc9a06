"""Stores and loads between a GPU and the arena, by length of run and way, beside one large pinned copy of the same run.

``python benches/gpu_transfer.py [--gib 2] [--json FILE]``. A block has 2 MiB of KV (an 8B Llama's 16 tokens); its
bytes lie in runs of the length given, as the engine's memory layout has them. GB/s of the best of a few rounds, from
submission to the last byte as the host sees it; CPU us a block is what submitting costs the copy thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvmp
from kvmp import _kvmp
from kvmp.client import Client
from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec
from kvmp.paged import PagedKV
from kvmp.server import Server

BLOCK_BYTES = 2 << 20
ROUNDS = 5
# Matrix products that stand for a step of the engine: about 0.2 s of them.
WORK = 120
RUNS = [4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20]


def seconds_of(work: Callable[[], object]) -> float:
    """The fastest of a few rounds, after one that is not timed."""
    times = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def pinned(total: int) -> dict[str, float]:
    """GB/s of one large copy each way."""
    host, device = (
        torch.empty(total, dtype=torch.uint8, pin_memory=True),
        torch.empty(total, dtype=torch.uint8, device="cuda"),
    )

    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return {
        "store": total / seconds_of(lambda: copy(host, device)) / 1e9,
        "load": total / seconds_of(lambda: copy(device, host)) / 1e9,
    }


def cache_of(blocks: int, run: int) -> dict[str, torch.Tensor]:
    """Blocks of 2 MiB in runs of `run` bytes: tensors of one run a block, or one with all of it."""
    whole = torch.randint(0, 256, (BLOCK_BYTES // run, blocks, run), dtype=torch.uint8, device="cuda")
    return {f"layer.{at}": whole[at] for at in range(BLOCK_BYTES // run)}


class Engine:
    """A server with one engine of one cache, its blocks stored and found."""

    def __init__(self, server: Server, paged: PagedKV, blocks: int, name: str):
        self.scheduler = Client.connect(server.endpoint)
        # Of many tensors the layout is too long for the server's table: its digest stands there, as in the connector.
        layout = {"sha256": hashlib.sha256(json.dumps(paged.layout()).encode()).hexdigest()}
        part = PartSpec(bytes=(paged.block_bytes,), layout=layout)
        spec = NamespaceSpec(model=name, facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,))
        namespace = self.scheduler.open(spec)
        self.worker = Client.connect(
            server.endpoint, role="worker", engine_token=self.scheduler.engine_token, part=0, dma=True
        )
        self.joined = self.worker.join(namespace.id, namespace.digest, json.dumps(layout))
        hashes = np.frombuffer(secrets.token_bytes(32 * blocks), np.uint8).reshape(-1, 32)
        self.lease = self.scheduler.reserve(namespace, hashes, first_block=0, timeout_ms=10_000)
        self.lease.handed_over()
        assert not self.lease.answers.any(), "a grant was refused"

    def close(self) -> None:
        self.worker.abort(self.lease.lease_id, self.lease.slots, self.lease.words, timeout_ms=10_000)
        for client in (self.worker, self.scheduler):
            client.close()


def measure(server: Server, run: int, blocks: int, way: str, width: int) -> dict[str, Any]:
    """One row of the table."""
    paged = PagedKV(cache_of(blocks, run), way=way, width=width)
    lanes = paged.lanes
    engine, ids = Engine(server, paged, blocks, f"{run}-{way}-{width}"), np.random.default_rng(1).permutation(blocks)
    try:
        row: dict[str, Any] = {"run": run, "way": lanes.way, "width": width}
        row["registered_s"] = register(lanes, engine.worker)
        slots, total = engine.lease.slots, blocks * BLOCK_BYTES

        def store() -> float:
            begun = time.thread_time()
            copy = lanes.store(engine.worker, engine.joined, 0, ids, slots)
            spent = time.thread_time() - begun
            copy.wait()
            return spent

        def load() -> float:
            begun = time.thread_time()
            copy = lanes.load(engine.worker, engine.joined, 0, ids, slots)
            spent = time.thread_time() - begun
            copy.wait()
            return spent

        for name, work in (("store", store), ("load", load)):
            row[f"{name}_gbs"] = total / seconds_of(work) / 1e9
            row[f"{name}_cpu_us_a_block"] = min(work() for _ in range(3)) * 1e6 / blocks
        return row
    finally:
        engine.close()


def beside(server: Server, run: int, blocks: int, way: str, width: int) -> dict[str, Any]:
    """What a copy and the engine's work cost each other: both alone, and at once."""
    paged = PagedKV(cache_of(blocks, run), way=way, width=width)
    lanes = paged.lanes
    engine, ids = Engine(server, paged, blocks, f"beside-{run}-{way}-{width}"), np.arange(blocks)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    row: dict[str, Any] = {"run": run, "way": lanes.way, "width": width}

    def work() -> None:
        for _ in range(WORK):
            torch.matmul(a, b)

    def work_alone() -> None:
        work()
        torch.cuda.synchronize()

    try:
        register(lanes, engine.worker)
        row["work_ms"] = seconds_of(work_alone) * 1e3
        for name, begin in (("store", lanes.store), ("load", lanes.load)):
            copy = partial(begin, engine.worker, engine.joined, 0, ids, engine.lease.slots)
            row[f"{name}_ms"] = seconds_of(lambda copy=copy: copy().wait()) * 1e3
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            copy().wait()
            row[f"{name}_beside_ms"] = (time.perf_counter() - begun) * 1e3
            torch.cuda.synchronize()
            row[f"work_beside_{name}_ms"] = (time.perf_counter() - begun) * 1e3
            # As a store of the engine's: behind the first half of the work, beside the second.
            begun = time.perf_counter()
            work()
            half = torch.cuda.current_stream().record_event()
            work()
            copy(after=half.cuda_event).wait()
            row[f"{name}_behind_half_ms"] = (time.perf_counter() - begun) * 1e3
            torch.cuda.synchronize()
        return row
    finally:
        engine.close()


def register(lanes: _kvmp.CudaLanes, worker: Client) -> float:
    """Seconds until all of the arena is registered."""
    start = time.perf_counter()
    lanes.register(worker)
    while (registered := lanes.registration())[0] < registered[1]:
        assert registered[2] is None, registered[2]
        time.sleep(0.002)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="bytes of KV to move, GiB")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--widths", type=int, nargs="*", default=[16], help="multiprocessors that the kernel may take")
    parser.add_argument("--runs", type=int, nargs="*", default=RUNS, help="lengths of run, bytes")
    parser.add_argument("--beside", action="store_true", help="copies beside matrix products, and these beside copies")
    options = parser.parse_args()
    blocks = int(options.gib * (1 << 30)) // BLOCK_BYTES
    base, rows = pinned(blocks * BLOCK_BYTES), []
    print(f"{torch.cuda.get_device_name()}; one pinned copy: store {base['store']:.1f}, load {base['load']:.1f} GB/s")
    print(f"{blocks} blocks of 2 MiB")
    print("     run  way     width  store GB/s  of pinned  CPU us   load GB/s  of pinned  CPU us")
    kinds = [(run, way, width) for run in options.runs for way, width in ways(options.widths)]
    with kvmp.launch(f"{int(options.gib * 2560) + 512}MiB") as server:
        with Client.connect(server.endpoint, role="tool") as tool:
            while tool.stats()["warming"]:
                time.sleep(0.01)
        for kind in kinds:
            run, way, width = kind
            rows.append((beside if options.beside else measure)(server, run, blocks, way, width))
            print(rows[-1] if options.beside else line(rows[-1], base), flush=True)
    if options.json:
        found = {"device": torch.cuda.get_device_name(), "pinned": base, "blocks": blocks, "rows": rows}
        Path(options.json).write_text(json.dumps(found, indent=1))


def ways(widths: list[int]) -> list[tuple[str, int]]:
    return [("batch", 0), *(("gather", width) for width in widths)]


def line(row: dict[str, Any], base: dict[str, float]) -> str:
    cells = [
        f"{row[f'{name}_gbs']:10.1f} {row[f'{name}_gbs'] / base[name]:9.2f} {row[f'{name}_cpu_us_a_block']:8.2f}"
        for name in ("store", "load")
    ]
    return f"{row['run']:8} {row['way']:7} {row['width']:5}  {cells[0]}  {cells[1]}"


if __name__ == "__main__":
    main()
