"""Time to first token of repeated long prompts in a real vLLM on a GPU, with kvmp and beside its peers, in one run.

``python benches/gpu_ttft.py [--modes none floor kvmp ...] [--json FILE]``. Each mode is a process of its own: an 8B
Llama's shape with random weights (speed is real, text is not), 6 documents of 16,384 tokens (2 GiB of KV each), a GPU
cache of 2.5 documents, so that every document of a round has left it since the last round. `floor` has no connector
and room for all documents: the least that a hit can cost. Round 0 is cold; the hit is the median over the rounds
after it. A few seconds pass before round 0, in which kvmp makes its arena known to CUDA.

``--no-hit`` instead: tokens a second of prompts that never repeat, without a connector and with kvmp, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "head_dim": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
KV_BYTES_A_TOKEN = 2 * 32 * 8 * 128 * 2
BLOCK_TOKENS = 16
CACHE = 32 << 30
LMCACHE_PORT = 5556
CONNECTORS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "none": None,
    "floor": None,
    "kvmp": ("KvmpConnector", {}),
    "offloading": ("OffloadingConnector", {"cpu_bytes_to_use": CACHE}),
    "simple": ("SimpleCPUOffloadConnector", {"cpu_bytes_to_use": CACHE}),
    "lmcache": ("LMCacheMPConnector", {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": LMCACHE_PORT}),
}


# One engine.


def engine(mode: str, documents: float, tokens: int, eager: bool) -> Any:
    """A vLLM with the mode's connector and room for so many documents."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    folder = os.path.join(tempfile.gettempdir(), "llama8b")
    os.makedirs(folder, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    connector = CONNECTORS[mode]
    transfer = None
    if connector is not None:
        transfer = KVTransferConfig(
            kv_connector=connector[0], kv_role="kv_both", kv_connector_extra_config=connector[1]
        )
    return LLM(
        folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=eager,
        max_model_len=tokens + 64,
        kv_transfer_config=transfer,
        enable_prefix_caching=True,
        num_gpu_blocks_override=int(tokens * documents / BLOCK_TOKENS),
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.6,
    )


def first_tokens(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each prompt in each round, and what was hit."""
    from vllm import SamplingParams

    llm = engine(options.mode, 8 if options.mode == "floor" else 2.5, options.tokens, options.eager)
    rng = random.Random(1)
    documents = [[rng.randrange(10, 120000) for _ in range(options.tokens)] for _ in range(options.documents)]
    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": [rng.randrange(10, 1000) for _ in range(512)]}], one, use_tqdm=False)
    time.sleep(6)
    rounds = []
    for _ in range(options.rounds):
        times, hit = [], 0
        for document in documents:
            begun = time.perf_counter()
            [output] = llm.generate([{"prompt_token_ids": document}], one, use_tqdm=False)
            times.append((time.perf_counter() - begun) * 1e3)
            hit += output.num_cached_tokens or 0
        rounds.append({"ms": times, "hit": hit / (options.tokens * options.documents)})
        time.sleep(1)
    return {"rounds": rounds}


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Prompt tokens a second, of prompts that never repeat; several bouts, as a machine's clock wanders."""
    from vllm import SamplingParams

    llm, rng, rates = engine(options.mode, 2.5, options.tokens, options.eager), random.Random(2), []
    few = SamplingParams(temperature=0, max_tokens=32, detokenize=False, ignore_eos=True)
    for bout in range(options.rounds + 1):
        prompts = [{"prompt_token_ids": [rng.randrange(10, 120000) for _ in range(2048)]} for _ in range(64)]
        begun = time.perf_counter()
        llm.generate(prompts, few, use_tqdm=False)
        if bout:
            rates.append(64 * (2048 + 32) / (time.perf_counter() - begun))
    return {"tokens_a_second": rates}


# All of them.


def command_of(mode: str) -> list[str]:
    """The server that a mode's connector wants; none for most."""
    if mode == "kvmp":
        return [sys.executable, "-m", "kvmp", "serve", "--size", f"{CACHE >> 30}GiB", "--ephemeral"]
    if mode == "lmcache":
        size = str(CACHE >> 30)
        lmcache = [sys.executable, "-m", "lmcache.cli.main", "server", "--port", str(LMCACHE_PORT)]
        return [*lmcache, "--l1-size-gb", size, "--eviction-policy", "LRU"]
    return []


@contextmanager
def server(mode: str, log: Path) -> Iterator[None]:
    """Runs a mode's server once it has all its memory."""
    command = command_of(mode)
    if not command:
        yield
        return
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            wait_ready(mode, log, process)
            yield
        finally:
            process.terminate()
            process.wait(30)


def wait_ready(mode: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    # LMCache's says nothing that would not be another release's wording: it has half a minute.
    until = time.monotonic() + 30
    while "are backed" not in log.read_text() if mode == "kvmp" else time.monotonic() < until:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server is not ready: {log.read_text()[-1500:]}")
        time.sleep(0.1)


def run(mode: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """One mode in a process of its own; None where it cannot be had here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, log, server_log = folder / "out.json", folder / "log", folder / "server.log"
        command = [sys.executable, __file__, "--mode", mode, "--json", str(out), "--rounds", str(options.rounds)]
        command += ["--tokens", str(options.tokens), "--documents", str(options.documents)]
        command += ["--no-hit"] * options.no_hit + ["--eager"] * options.eager
        try:
            with server(mode, server_log), log.open("wb") as file:
                subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, timeout=options.limit)
        except (subprocess.SubprocessError, RuntimeError) as error:
            text = log.read_text()[-3000:] if log.exists() else ""
            print(f"{mode}: {type(error).__name__} {error}\n{text}", file=sys.stderr, flush=True)
            return None
        found: dict[str, Any] = json.loads(out.read_text())
        return found


_LINK = """
import time, torch
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


def compare_first_tokens(options: argparse.Namespace) -> dict[str, Any]:
    speed, table = link_gbs(), {}
    kv_ms = options.tokens * KV_BYTES_A_TOKEN / speed / 1e6
    print("mode          cold ms   hit ms  (each round's median)   hit share", flush=True)
    for mode in options.modes:
        if (found := run(mode, options)) is None:
            continue
        rounds = [statistics.median(entry["ms"]) for entry in found["rounds"]]
        hit = statistics.median(ms for entry in found["rounds"][1:] for ms in entry["ms"])
        share, later = found["rounds"][-1]["hit"], [round(ms, 1) for ms in rounds[1:]]
        table[mode] = {"cold_ms": rounds[0], "hit_ms": hit, "rounds_ms": rounds, "hit": share}
        print(f"{mode:12} {rounds[0]:8.1f} {hit:8.1f}  {later}  {share:.3f}", flush=True)
    if "floor" in table and "kvmp" in table:
        floor, hit = table["floor"]["hit_ms"], table["kvmp"]["hit_ms"]
        print(f"floor + bytes / link rate = {floor:.1f} + {kv_ms:.1f} = {floor + kv_ms:.1f} ms")
        print(f"kvmp's hit is {hit / (floor + kv_ms):.2f} x that")
    return {"link_gbs": speed, "kv_ms": kv_ms, "modes": table}


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


def compare_throughput(options: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"none": [], "kvmp": []}
    for mode in ("none", "kvmp", "kvmp", "none"):
        if (found := run(mode, options)) is not None:
            rates[mode] += found["tokens_a_second"]
            print(f"{mode:6} {[round(rate) for rate in found['tokens_a_second']]}", flush=True)
    medians = {mode: statistics.median(found) for mode, found in rates.items() if found}
    if len(medians) == 2:
        lost = 1 - medians["kvmp"] / medians["none"]
        print(f"tokens a second, median: none {medians['none']:.0f}, kvmp {medians['kvmp']:.0f}: {lost:+.2%} lost")
    return {"tokens_a_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="*", default=list(CONNECTORS), choices=list(CONNECTORS))
    parser.add_argument("--mode", choices=list(CONNECTORS), help=argparse.SUPPRESS)
    parser.add_argument("--no-hit", action="store_true", help="throughput of prompts that never repeat")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a document")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--limit",
        type=float,
        default=240.0,
        help="seconds a mode may take: on a slow host an engine is up in two minutes",
    )
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--svg", help="file for a plot of them")
    options = parser.parse_args()
    if options.mode:
        result = throughput(options) if options.no_hit else first_tokens(options)
    else:
        result = compare_throughput(options) if options.no_hit else compare_first_tokens(options)
    if options.svg:
        Path(options.svg).write_text(svg(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
