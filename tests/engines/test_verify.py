"""`kvmp.verify = always`: bytes that changed in the arena are never used; the request is computed again."""

import numpy as np

import kvmp
from tests.engines.conftest import StartEngine
from tests.engines.harness import (
    BLOCK,
    NEW_TOKENS,
    Reference,
    await_blocks,
    forget,
    loaded_tokens,
    random_prompt,
    spoil,
    stats,
)

BLOCKS = 6


def test_flipped_bytes_are_computed_again_and_counted(start_engine: StartEngine, reference: Reference) -> None:
    prompt = random_prompt("to be spoilt and found out", BLOCKS * BLOCK + 1)
    with kvmp.launch("128MiB") as server:
        engine = start_engine(endpoint=server.endpoint, connector_config={"kvmp.verify": "always"}).wait_up()
        await_blocks(server, 0)
        before = np.fromfile(server.segment_path, np.uint8)
        engine.generate([prompt], 1)
        await_blocks(server, BLOCKS)
        forget(engine)
        (sound,) = engine.generate([prompt], NEW_TOKENS)
        assert sound.cached_tokens == loaded_tokens(engine) == BLOCKS * BLOCK
        assert sound.tokens == reference.tokens(prompt)
        spoil(server.segment_path, before)
        forget(engine)
        (found_out,) = engine.generate([prompt], NEW_TOKENS)
        assert found_out.tokens == reference.tokens(prompt)
        assert engine.counters()["kvmp_damaged_blocks"] >= 1
        assert stats(server)["distrusted_blocks"] >= 1
        warnings = [line for line in engine.log_path.read_text().splitlines() if "not those that were stored" in line]
        assert len(warnings) == 1
        # What was damaged left the cache and was stored anew: the next one is a sound hit.
        await_blocks(server, BLOCKS)
        forget(engine)
        (again,) = engine.generate([prompt], NEW_TOKENS)
        assert again.tokens == reference.tokens(prompt)
        assert again.cached_tokens == BLOCKS * BLOCK
        engine.kill()
