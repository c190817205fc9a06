"""A server killed or frozen at every moment of a real engine's: right tokens, no waits, one warning, and hits again.

Every test proves its moment: the request sent and unanswered (the trap), the copy part done (the gate).
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from tests.engines.conftest import StartEngine
from tests.engines.gate import Gate
from tests.engines.harness import BLOCK, NEW_TOKENS, Reference, forget, loaded_tokens, random_prompt, stats, until
from tests.engines.life import BLOCKS, BOUND_MS, KEPT, TOKENS, Life
from tests.engines.successors import Successors
from tests.engines.trap import OWN_BOUND_MS, Sprung, Trap
from tests.stopping import go_on, stopped

ROUNDS = 3
FROZEN_S = 6.0  # twenty bounds
MAX_TOKENS = 2048
KV_BLOCKS = 100  # of each engine's own cache
SLOTS = 32


@pytest.fixture(scope="module")
def life(start_engine: StartEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    folder = tmp_path_factory.mktemp("life")
    gate, successors = Gate(folder), Successors("lost", folder)
    server = successors.start()
    size = {"endpoint": server.endpoint, "kv_blocks": KV_BLOCKS, "max_model_len": MAX_TOKENS}
    size["connector_config"] = {"kvmp.timeout_ms": BOUND_MS}
    engine = start_engine(connector_module="tests.engines.trapped", env=gate.environment, **size)
    other = start_engine(**size)
    life = Life(successors, server, engine.wait_up(), other.wait_up(), gate, Trap(folder))
    until(lambda: stats(server)["engines"] == 2, "both engines attached")
    life.engine.generate([KEPT], 1)
    until(lambda: stats(server)["committed_blocks"] == BLOCKS, "stored")
    yield life
    go_on(life.server.pid)
    gate.open()
    successors.end(life.server)


@pytest.fixture(autouse=True)
def _open_gate(life: Life) -> Iterator[None]:
    """Nor is a server left frozen by a test that fails: the next ones would fail for it."""
    yield
    life.gate.open()
    go_on(life.server.pid)


# ---- SIGKILL


@pytest.mark.parametrize("pace", ["fast", "slow"])
def test_killed_while_the_engine_idles(life: Life, reference: Reference, pace: str) -> None:
    """Again and again; `slow` is after the engine has worked without it."""
    for number in range(ROUNDS):
        life.assert_nothing_open()
        with life.one_loss():
            life.server.kill()
            if pace == "slow":
                output, loaded = life.ask(prompt := random_prompt(f"alone {number}", TOKENS))
                assert output.tokens == reference.tokens(prompt)
                assert (output.cached_tokens, loaded) == (0, 0)
                assert life.count("attached") == 0
            else:
                life.succeed()
        if pace == "slow":
            life.succeed()
        life.assert_old_content_found(reference)
        assert life.count("attached") == 1


@pytest.mark.parametrize("moment", ["lookup", "reserve"])
def test_killed_while_the_engine_asks(life: Life, reference: Reference, moment: str) -> None:
    prompt = random_prompt(f"killed in a {moment}", TOKENS)
    with life.one_loss():
        life.trap.arm(moment, life.server.pid, kill=True)
        pending = life.engine.submit(prompt, NEW_TOKENS)
        assert life.trap.sprung() == Sprung(sent=1, stood_still=True)
        assert pending.result().tokens == reference.tokens(prompt)
    life.succeed()
    life.assert_old_content_found(reference)


def test_killed_while_the_engine_stores(life: Life, reference: Reference) -> None:
    """The request ends without it; the worker ends its copy under no server, and the next one has the slots back."""
    prompt = random_prompt("killed in a store", TOKENS)
    with life.one_loss():
        pending = life.begin_store(prompt)
        life.server.kill()
        assert pending.result().tokens == reference.tokens(prompt)
        assert life.gate.passed("store") < BLOCKS
        life.gate.open()
    life.succeed()
    life.assert_old_content_found(reference)
    output, loaded = life.ask(prompt)
    assert output.tokens == reference.tokens(prompt)
    assert loaded == 0


def test_killed_while_the_engine_loads(life: Life, reference: Reference) -> None:
    """The mapping outlives the server and the slot words still match: what is loaded is right, and used."""
    failed = life.count("failed_load_blocks")
    with life.one_loss():
        pending = life.begin_load(KEPT)
        life.server.kill()
        assert life.gate.passed("load") < BLOCKS
        life.gate.open()
        assert pending.result().tokens == reference.tokens(KEPT)
        assert life.gate.passed("load") == BLOCKS
        assert life.count("failed_load_blocks") == failed
    life.succeed()
    life.assert_old_content_found(reference)


# ---- `kvmp serve --upgrade`


def test_upgraded_while_the_engines_work(life: Life, reference: Reference) -> None:
    """One is in mid-load and its load is used, the other asks on and on; both come back by themselves, once."""
    attached, warned, failed = life.attached(), len(life.warnings()), life.count("failed_load_blocks")
    theirs = random_prompt("asked over an upgrade", 2 * BLOCK + 5)
    right = {"kept": reference.tokens(KEPT), "theirs": reference.tokens(theirs)}
    committed = stats(life.server)["committed_blocks"]
    life.other.generate([theirs], 1)
    until(lambda: stats(life.server)["committed_blocks"] == committed + 2, "stored, so that the next server need not")
    pending = life.begin_load(KEPT)
    with ThreadPoolExecutor(1) as beside:
        upgrade = beside.submit(life.successors.upgrade, life.server)
        answers = []
        while not upgrade.done():
            forget(life.other)
            answers.append(life.other.generate([theirs], NEW_TOKENS)[0].tokens)
    life.server = upgrade.result()
    assert answers
    assert set(map(tuple, answers)) == {tuple(right["theirs"])}
    assert life.gate.passed("load") < BLOCKS
    assert not pending.done()
    life.gate.open()
    assert pending.result().tokens == right["kept"]
    assert life.gate.passed("load") == BLOCKS
    assert life.count("failed_load_blocks") == failed
    until(lambda: life.attached() == [times + 1 for times in attached], "both attached anew")
    life.assert_old_content_found(reference)
    assert _asked_of_the_other(life, KEPT) == (right["kept"], BLOCKS * BLOCK)
    assert len(life.warnings()) <= warned + 1
    assert life.attached() == [times + 1 for times in attached]
    life.assert_never_waited()


# ---- SIGSTOP


def test_frozen_for_many_bounds_while_the_engine_works(life: Life, reference: Reference) -> None:
    """As if gone; the lookup that was given up is answered late, and what it pinned is let go."""
    answered, timeouts = len(life.lines("answers again")), life.count("lookup_timeouts")
    leases = stats(life.server)["lookups"]
    with life.one_loss():
        life.trap.arm("lookup", life.server.pid)
        frozen_at, worked = time.monotonic(), count(1)
        while time.monotonic() < frozen_at + FROZEN_S:
            prompt = KEPT if (number := next(worked)) == 1 else random_prompt(f"frozen {number}", TOKENS)
            output, loaded = life.ask(prompt)
            assert output.tokens == reference.tokens(prompt)
            assert loaded == 0
        assert life.trap.sprung() == Sprung(sent=1, stood_still=True)
        assert life.count("lookup_timeouts") == timeouts + 1
        assert life.count("attached") == 0
    go_on(life.server.pid)
    until(lambda: len(life.lines("answers again")) > answered, "the engine back")
    assert stats(life.server)["lookups"] == leases + 1
    life.assert_nothing_open()
    output, loaded = life.ask(KEPT)
    assert output.tokens == reference.tokens(KEPT)
    assert loaded == BLOCKS * BLOCK


def test_frozen_with_a_reserve_under_way(life: Life, reference: Reference) -> None:
    """It is granted late, when nobody wants it any more: the slots come back, nothing of it is ever visible."""
    answered, before = len(life.lines("answers again")), stats(life.server)
    prompt = random_prompt("frozen in a reserve", TOKENS)
    with life.one_loss():
        life.trap.arm("reserve", life.server.pid)
        pending = life.engine.submit(prompt, NEW_TOKENS)
        assert life.trap.sprung() == Sprung(sent=1, stood_still=True)
        assert pending.result().tokens == reference.tokens(prompt)
        forget(life.engine)  # nothing pinned on the engine either
    go_on(life.server.pid)
    until(lambda: len(life.lines("answers again")) > answered, "the engine back")
    until(lambda: stats(life.server)["granted"] == before["granted"] + BLOCKS, "granted late")
    life.assert_nothing_open()
    assert stats(life.server)["committed_blocks"] == before["committed_blocks"]
    output, loaded = life.ask(prompt)
    assert (output.tokens, loaded) == (reference.tokens(prompt), 0)


def test_frozen_in_mid_store(life: Life, reference: Reference) -> None:
    """The worker's commit is under way when it gives that up; it is taken late: every block whole, nothing Writing."""
    prompt = random_prompt("frozen in a store", TOKENS)
    failed, stored = life.count("failed_store_blocks"), life.count("stored_blocks")
    before = stats(life.server)
    pending = life.begin_store(prompt)
    with stopped(life.server.pid):
        assert life.gate.passed("store") < BLOCKS
        life.gate.open()
        assert pending.result().tokens == reference.tokens(prompt)
        until(lambda: life.count("failed_store_blocks") == failed + BLOCKS, "the store given up")
        assert life.gate.passed("store") == BLOCKS
        life.assert_never_waited()
    life.assert_nothing_open()
    now = stats(life.server)
    assert [now[key] - before[key] for key in ("granted", "committed_blocks", "aborted_parts")] == [BLOCKS, BLOCKS, 0]
    assert life.count("stored_blocks") == stored  # that much is not claimed
    output, loaded = life.ask(prompt)
    assert (output.tokens, loaded) == (reference.tokens(prompt), BLOCKS * BLOCK)


# ---- an arena that is too small


def test_a_full_pool_never_says_stored(life: Life, reference: Reference) -> None:
    """Requests larger than the arena: what is said to be stored is what was committed; all else is refused, counted."""
    long = random_prompt("larger than the arena", (SLOTS + 8) * BLOCK + 1)
    before, stored, refused = stats(life.server), life.count("stored_blocks"), life.count("refused_store_blocks")
    for _ in range(3):
        output, loaded = life.ask(long)
        assert output.tokens == reference.tokens(long)
        life.assert_nothing_open()
    assert 0 < loaded <= SLOTS * BLOCK
    now = stats(life.server)
    assert now["blocks_ready"] == SLOTS
    assert now["no_space"] > before["no_space"]
    said_no = sum(now[key] - before[key] for key in ("no_space", "no_parent", "not_admitted", "warming_answers"))
    assert life.count("refused_store_blocks") - refused == said_no
    assert life.count("stored_blocks") - stored == now["committed_blocks"] - before["committed_blocks"]


def test_a_pool_of_pinned_blocks_is_refused_too(life: Life, reference: Reference) -> None:
    """Half of the arena is being loaded, which is all that an engine may pin; nobody else's blocks take its place."""
    pinned = random_prompt("larger than the arena", SLOTS // 2 * BLOCK + 1)
    pending = life.begin_load(pinned)
    before, failed = stats(life.server), life.count("failed_load_blocks")
    assert (before["blocks_ready"], before["pins"]) == (SLOTS, 1)  # the path's tip, which protects the path
    beside = random_prompt("beside a pinned arena", SLOTS * BLOCK + 1)
    stored = life.other.counters().get("kvmp_stored_blocks", 0)
    for _ in range(2):
        (output,) = life.other.generate([beside], NEW_TOKENS)
        assert output.tokens == reference.tokens(beside)
        forget(life.other)
    now = stats(life.server)
    assert now["no_space"] > before["no_space"]
    assert (now["pins"], now["evictions"]) == (1, before["evictions"] + SLOTS // 2)
    said = life.other.counters()["kvmp_stored_blocks"] - stored
    assert said == now["committed_blocks"] - before["committed_blocks"] == SLOTS // 2
    assert not pending.done()
    life.gate.open()
    assert pending.result().tokens == reference.tokens(pinned)
    assert life.count("failed_load_blocks") == failed
    life.assert_nothing_open()


# ---- weights updated in place, and announced


def test_a_reset_aborts_the_stores_begun_before(life: Life, reference: Reference) -> None:
    prompt = random_prompt("stored across a reset", TOKENS)
    committed, failed = stats(life.server)["committed_blocks"], life.count("failed_store_blocks")
    pending = life.begin_store(prompt)
    assert pending.result().tokens == reference.tokens(prompt)
    life.engine.reset(connector=True)  # says no: the engine's own cache is pinned by the store; kvmp's is forgotten
    life.gate.open()
    until(lambda: life.count("failed_store_blocks") == failed + BLOCKS, "the store given up")
    life.assert_nothing_open()
    assert stats(life.server)["committed_blocks"] == committed
    output, loaded = life.ask(prompt)
    assert (output.tokens, loaded) == (reference.tokens(prompt), 0)


def test_a_pause_for_new_weights_lets_nothing_old_be_found(life: Life, reference: Reference) -> None:
    """It goes on storing, where nobody else looks; the engine beside it goes on with what it has."""
    mine, theirs = (random_prompt(f"stored before a pause {whose}", TOKENS) for whose in ("mine", "theirs"))
    for engine, prompt in ((life.engine, mine), (life.other, theirs)):
        committed = stats(life.server)["committed_blocks"]
        engine.generate([prompt], NEW_TOKENS)
        until(lambda committed=committed: stats(life.server)["committed_blocks"] == committed + BLOCKS, "stored")
    namespaces = stats(life.server)["namespaces"]
    life.engine.pause()
    until(lambda: stats(life.server)["namespaces"] == namespaces + 1, "a fresh namespace")
    for found in (0, BLOCKS * BLOCK):
        output, loaded = life.ask(mine)
        assert (output.tokens, loaded) == (reference.tokens(mine), found)
        life.assert_nothing_open()
    forget(life.other)
    assert _asked_of_the_other(life, theirs) == (reference.tokens(theirs), BLOCKS * BLOCK)


# ---- the control, and the engine's end


def test_a_call_that_waited_would_be_counted_and_cut_to_the_bound(life: Life, reference: Reference) -> None:
    """The control of every `assert_never_waited`: ten calls of two seconds each, in one step of the engine's thread."""
    life.assert_never_waited()
    prompt = random_prompt("made to wait", TOKENS)
    life.trap.arm("wait", life.server.pid)
    pending = life.engine.submit(prompt, NEW_TOKENS)
    life.trap.sprung()
    go_on(life.server.pid)
    assert pending.result().tokens == reference.tokens(prompt)
    until(lambda: life.count("longest_step_wait_us") >= BOUND_MS * 1000, "the wait counted")
    assert life.count("longest_step_wait_us") < OWN_BOUND_MS * 1000
    life.assert_nothing_open()


def test_a_worker_killed_between_reserve_and_commit(life: Life, reference: Reference) -> None:
    """The last of the engine: vLLM ends with its worker. Nothing half-written is ever visible; the other goes on."""
    prompt = random_prompt("worker killed", TOKENS)
    life.begin_store(prompt, 500)
    before = stats(life.server)
    life.engine.process_named("VLLM::Worker").signal(9)
    life.gate.open()
    until(lambda: stats(life.server)["engines"] == 1, "the engine gone")
    life.assert_nothing_open()
    assert stats(life.server)["committed_blocks"] == before["committed_blocks"]
    forget(life.other)
    for found in (0, BLOCKS * BLOCK):
        assert _asked_of_the_other(life, prompt) == (reference.tokens(prompt), found)


def _asked_of_the_other(life: Life, prompt: list[int]) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's came from kvmp."""
    before = loaded_tokens(life.other)
    (output,) = life.other.generate([prompt], NEW_TOKENS)
    life.assert_nothing_open()
    forget(life.other)
    return output.tokens, loaded_tokens(life.other) - before
