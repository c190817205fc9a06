"""Time to first token of repeated long prompts in a real vLLM on a GPU, with kvmp and beside its peers, in one run.

``python benches/gpu_ttft.py [--modes none floor kvmp ...] [--json FILE] [--svg FILE]``. An 8B Llama's shape with random
weights (speed is real, text is not), 6 documents of 16,384 tokens (2 GiB of KV each), a GPU cache of 2.5 documents, so
that every document of a round has left it since the last round. `floor` has no connector and room for all documents:
the least that a hit can cost. Round 0 is cold; the hit is the median over the rounds after it. Engines are started
``--at-once`` and do their rounds in turn.

``--no-hit`` instead: tokens a second of prompts that never repeat, without a connector and with kvmp, in turns.
``--tiny`` tries the bench itself, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_engines import MODES, Engine, Workload, engines

_LINK = """
import time, torch
if not torch.cuda.is_available():
    raise SystemExit(print(1.0, "no GPU, so nothing that was measured", sep="|"))
host = torch.empty(2 << 30, dtype=torch.uint8, pin_memory=True)
device, best = torch.empty_like(host, device="cuda"), float("inf")
for _ in range(4):
    torch.cuda.synchronize()
    begun = time.perf_counter()
    device.copy_(host)
    torch.cuda.synchronize()
    best = min(best, time.perf_counter() - begun)
print(host.nbytes / best / 1e9, torch.cuda.get_device_name(), sep="|")
"""


def link_gbs() -> float:
    """GB/s of one large pinned copy to the GPU, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _LINK], capture_output=True, text=True, check=True)
    speed, name = done.stdout.split("|")
    print(f"{name.strip()}; one pinned copy {float(speed):.1f} GB/s", flush=True)
    return float(speed)


# Hits.


def compare_first_tokens(modes: list[str], work: Workload, rounds: int, at_once: int) -> dict[str, Any]:
    speed, table = link_gbs(), {}
    kv_ms = work.tokens * work.kv_bytes_a_token / speed / 1e6
    print("mode          cold ms   hit ms  (each round's median)   hit share", flush=True)
    for first in range(0, len(modes), at_once):
        with engines(modes[first : first + at_once], work) as up:
            for mode, found in rounds_in_turn(up, rounds).items():
                table[mode] = summary(found)
                print(row(mode, table[mode]), flush=True)
    if "floor" in table and "kvmp" in table:
        floor, hit = table["floor"]["hit_ms"], table["kvmp"]["hit_ms"]
        print(f"floor + bytes / link rate = {floor:.1f} + {kv_ms:.1f} = {floor + kv_ms:.1f} ms")
        print(f"kvmp's hit is {hit / (floor + kv_ms):.2f} x that")
    return {"link_gbs": speed, "kv_ms": kv_ms, "modes": table}


def rounds_in_turn(up: list[Engine], rounds: int) -> dict[str, list[dict[str, Any]]]:
    # kvmp makes its arena known to CUDA.
    time.sleep(6)
    found: dict[str, list[dict[str, Any]]] = {engine.mode: [] for engine in up}
    for _ in range(rounds):
        for engine in up:
            found[engine.mode].append(engine.ask("first_tokens"))
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    medians = [statistics.median(entry["ms"]) for entry in rounds]
    hit = statistics.median(ms for entry in rounds[1:] for ms in entry["ms"])
    return {"cold_ms": medians[0], "hit_ms": hit, "rounds_ms": medians, "hit": rounds[-1]["hit"]}


def row(mode: str, found: dict[str, Any]) -> str:
    later = [round(ms, 1) for ms in found["rounds_ms"][1:]]
    return f"{mode:12} {found['cold_ms']:8.1f} {found['hit_ms']:8.1f}  {later}  {found['hit']:.3f}"


def svg(result: dict[str, Any]) -> str:
    """Bars of the hit's time, one a mode, with a line at the least that it can be."""
    modes = sorted(result["modes"].items(), key=lambda entry: entry[1]["hit_ms"])
    scale = 560 / max(found["hit_ms"] for _, found in modes)
    least = (result["modes"]["floor"]["hit_ms"] + result["kv_ms"]) * scale if "floor" in result["modes"] else 0
    rows, height = [], 40 + 30 * len(modes)
    for at, (mode, found) in enumerate(modes):
        y, width = 30 + 30 * at, found["hit_ms"] * scale
        colour = "#2a6f97" if mode == "kvmp" else "#b8c4cc"
        rows.append(f'<text x="92" y="{y + 15}" text-anchor="end">{mode}</text>')
        rows.append(f'<rect x="100" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>')
        rows.append(f'<text x="{106 + width:.1f}" y="{y + 15}">{found["hit_ms"]:.0f} ms</text>')
    rows.append(f'<line x1="{100 + least:.1f}" x2="{100 + least:.1f}" y1="24" y2="{height - 10}" stroke="#c1121f"/>')
    title = "Time to first token of a prompt found in the cache; red: resident prefix + bytes / link"
    frame = f'xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" font-family="sans-serif" font-size="13"'
    return f'<svg {frame}>\n<text x="8" y="16">{title}</text>\n' + "\n".join(rows) + "\n</svg>\n"


# No hits.


def compare_throughput(work: Workload, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"none": [], "kvmp": []}
    with engines(["none", "kvmp"], work) as up:
        for bout in range(rounds + 1):
            # Who goes first changes from pair to pair. The first bout of each warms up.
            for engine in up if bout % 2 else up[::-1]:
                rate = engine.ask("bout")
                rates[engine.mode] += [rate] * (bout > 0)
    pairs = list(zip(rates["none"], rates["kvmp"], strict=False))
    for none, kvmp in pairs:
        print(f"tokens a second: none {none:.0f}, kvmp {kvmp:.0f}: {1 - kvmp / none:+.2%} lost", flush=True)
    if len(pairs) > 1:
        low, middle, high = statistics.quantiles((1 - kvmp / none for none, kvmp in pairs), n=4)
        print(f"of {len(pairs)} pairs the median: {middle:+.2%} lost; half of them between {low:+.2%} and {high:+.2%}")
    return {"tokens_a_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--no-hit", action="store_true", help="throughput of prompts that never repeat")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a document")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--rounds", type=int, help="4 if not given; with --no-hit pairs, 24")
    parser.add_argument("--at-once", type=int, default=3, help="engines on the GPU at once")
    parser.add_argument("--cache-gib", type=int, default=16, help="host memory of a connector's cache")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a small model: tries the bench, measures nothing")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that a start, or a round, may take")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--svg", help="file for a plot of them")
    options = parser.parse_args()
    work = Workload(
        options.tokens,
        options.documents,
        options.cache_gib,
        options.eager,
        options.tiny,
        memory_share=0.8 / (2 if options.no_hit else options.at_once),
        limit_s=options.limit,
    )
    if options.no_hit:
        result = compare_throughput(work, options.rounds or 24)
    else:
        result = compare_first_tokens(options.modes, work, options.rounds or 4, options.at_once)
    if options.svg and not options.no_hit:
        Path(options.svg).write_text(svg(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
