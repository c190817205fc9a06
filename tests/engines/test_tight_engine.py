"""A bfloat16 engine with room for one long request: bytes make the way to kvmp and back unchanged; a request waits."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

import kvmp
from demo.engine import Engine
from tests.engines.conftest import StartEngine
from tests.engines.harness import BLOCK, NEW_TOKENS, await_blocks, forget, loaded_tokens, random_prompt, stats, until

MAX_TOKENS = 2_048
KV_BLOCKS = MAX_TOKENS // BLOCK + 2  # one is vLLM's null block
BLOCKS = 6
PAGE = 4096
PAGES_A_BLOCK = 4 * 2 * 2 * 64 * BLOCK * 2 // PAGE  # layers, K and V, heads, head size, tokens, bytes of a bfloat16

Tight = tuple[kvmp.Server, Engine]


@pytest.fixture(scope="module")
def tight(start_engine: StartEngine) -> Iterator[Tight]:
    with kvmp.launch("64MiB") as server:
        engine = start_engine(endpoint=server.endpoint, dtype="bfloat16", kv_blocks=KV_BLOCKS, max_model_len=MAX_TOKENS)
        yield server, engine.wait_up()


def test_what_was_loaded_is_byte_for_byte_what_was_stored(tight: Tight) -> None:
    """stored -> loaded into blocks that held other KV -> the arena wiped -> stored again, from what was loaded."""
    server, engine = tight
    prompt = random_prompt("bytes", BLOCKS * BLOCK + 1)
    engine.generate([prompt], 1)
    await_blocks(server, BLOCKS)
    stored = _pages(server)
    assert len(stored) == BLOCKS * PAGES_A_BLOCK
    _overwrite_every_block(engine)
    before = loaded_tokens(engine)
    engine.generate([prompt], 1)
    assert loaded_tokens(engine) - before == BLOCKS * BLOCK
    until(lambda: not stats(server)["blocks_writing"], "no store left open")
    _wipe(server)
    (output,) = engine.generate([prompt], 1)
    assert output.cached_tokens == BLOCKS * BLOCK
    assert loaded_tokens(engine) - before == BLOCKS * BLOCK  # resident: what was loaded before
    await_blocks(server, BLOCKS)
    assert _pages(server) == stored


def _overwrite_every_block(engine: Engine) -> None:
    """Two prompts that fill the engine's own cache, each after the cache was emptied."""
    for number in range(2):
        forget(engine)
        engine.generate([random_prompt(f"filler {number}", MAX_TOKENS - 1)], 1)
    forget(engine)


def _data_pages(server: kvmp.Server, mode: str) -> tuple[np.memmap, np.ndarray]:
    """The segment in pages, and which of them hold KV: in no other is most of the bytes set."""
    segment = np.memmap(server.segment_path, np.uint8, mode=mode).reshape(-1, PAGE)
    return segment, np.flatnonzero(np.count_nonzero(segment, axis=1) > PAGE // 2)


def _pages(server: kvmp.Server) -> list[bytes]:
    """The arena's KV, page by page, sorted, for a block may lie in another slot."""
    segment, at = _data_pages(server, "r")
    return sorted(segment[page].tobytes() for page in at)


def _wipe(server: kvmp.Server) -> None:
    """Evict everything, and leave none of its bytes."""
    with closing(kvmp.Client.connect(server.endpoint, role="tool", timeout_ms=5000)) as client:
        client.clear()
    assert stats(server)["blocks_ready"] == 0
    segment, at = _data_pages(server, "r+")
    segment[at] = 0
    assert not _pages(server)


def test_abort_of_a_request_that_still_waits_for_room(tight: Tight) -> None:
    """Its lookup is answered and its lease held; both end with it, while the request before it runs on.

    So it is with two hundred that wait behind it, and that vLLM has not even asked for.
    """
    server, engine = tight
    prompt = random_prompt("waits", MAX_TOKENS - 2)
    ready = stats(server)["blocks_ready"]
    engine.generate([prompt], 1)
    await_blocks(server, ready + KV_BLOCKS // 2)  # stores pin half of the engine's blocks, no more
    forget(engine)
    loaded, generated = loaded_tokens(engine), engine.counters()["generation_tokens"]
    running = engine.submit(random_prompt("runs", MAX_TOKENS // 2 + 1), 1_000)
    until(lambda: engine.counters()["generation_tokens"] > generated, "the first request runs")
    waiting = engine.submit(prompt, NEW_TOKENS)
    until(lambda: stats(server)["read_leases"], "the second request's lookup answered")
    behind = [engine.submit(prompt[: 2 * BLOCK + 3], 500) for _ in range(200)]
    until(lambda: stats(server)["read_leases"] == 201, "their lookups answered too")
    assert stats(server)["pins"] == 201  # each of its path's tip
    for request in behind:
        engine.abort(request)
    assert {request.result().finish for request in behind} == {"abort"}
    until(lambda: stats(server)["read_leases"] == 1, "their leases released")
    assert not waiting.done()
    engine.abort(waiting)
    assert waiting.result().finish == "abort"
    assert waiting.result().tokens == []
    until(lambda: not stats(server)["read_leases"], "its lease released")
    assert stats(server)["pins"] == 0
    assert not running.done()
    assert loaded_tokens(engine) == loaded
    engine.abort(running)
    until(lambda: not stats(server)["blocks_writing"], "no store left open")
