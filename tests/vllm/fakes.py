"""Stand-ins for server, client, paged copies and vLLM's objects: what the connector sees of them, in one process."""

from __future__ import annotations

import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np

from kvmp.client import Answer
from kvmp.errors import BoundExceeded, Busy, ConnectError, LeaseError, NamespaceError, NoServer, ServerLost

BLOCK = 4  # tokens a block


class FakeServer:
    """A store of blocks by (namespace digest, key), with slots that words guard."""

    def __init__(self, slots: int = 1000):
        self.epoch = 1
        self.segment = "segment-1"
        self.tokens = itertools.count(7)
        self.capacity = slots
        self.blocks: dict[tuple[str, bytes], tuple[int, int]] = {}
        self.writing: dict[int, tuple[str, bytes, set[int]]] = {}
        self.arena: dict[tuple[int, int], bytes] = {}
        self.word_of: dict[int, int] = {}
        self.digests: list[str] = []
        self.specs: list[dict] = []
        self.next_slot = 0
        self.silent = False  # answers nothing
        self.gone = False  # refuses and hangs up
        self.reused: list[FakeClient | None] = []  # whose mapping each client took over
        self.late = set()  # verbs that miss their bound
        self.busy = set()  # verbs for which there is no room
        self.closed_parts = set()  # (engine token, part) that nobody may join for any more
        self.features = ["readers"]
        self.refused_adapters = 0  # namespaces of adapters refused
        self.refuse_adapters = False
        self.unknown_leases = set()
        self.clients = []
        self.released = 0
        self.leases = 0
        self.aborted = 0
        self.cancelled = 0
        self.reserves: list[tuple[int, int]] = []

    def connect(
        self, endpoint, *, role, engine_token=None, part=None, socket_dir=None, timeout_ms=1000, dma=False, reuse=None
    ):
        if self.gone:
            raise NoServer(f"nobody listens at {endpoint}")
        if role == "worker" and (engine_token, part) in self.closed_parts:
            raise ConnectError(f"{endpoint} refused: engine {engine_token:016x} cannot be joined: its part was closed")
        self.reused.append(reuse)
        return FakeClient(self, engine_token or next(self.tokens), part, role)

    def grant(self, digest: str, key: bytes) -> tuple[int, int]:
        slot, self.next_slot = self.next_slot, self.next_slot + 1
        word = slot * 1000 + 1
        self.writing[slot], self.word_of[slot] = (digest, key, set()), word
        return slot, word


class FakeClient:
    def __init__(self, server: FakeServer, token: int, part, role):
        self.server, self.engine_token, self.part, self.role = server, token, part, role
        self.features, self.server_version = server.features, "0.0.1"
        self.server_epoch, self.segment_id = server.epoch, server.segment
        self.endpoint, self.closed, self.waited_us = "unix:/fake", False, 0
        self.missed = False
        self.joins: list[str] = []
        self.hung_up = False
        server.clients.append(self)

    @property
    def lost(self):
        return self.missed or self.hung_up or self.server.gone or self.server.epoch != self.server_epoch

    def _answer(self, verb):
        if verb in self.server.late:
            self.missed = True
            raise BoundExceeded(f"no answer to a {verb}")
        self._alive()

    def _has_room(self, verb):
        if verb in self.server.busy:
            raise Busy(f"no room for a {verb}")

    def _alive(self):
        if self.closed or self.lost:
            raise ServerLost("closed" if self.closed else "hang-up")

    def ping(self, timeout_ms=100):
        self.missed = self.missed and "ping" in self.server.late
        self._alive()
        if self.server.silent:
            raise BoundExceeded("no answer to a ping")
        return 0.001

    def open(self, spec, timeout_ms=1000):
        self._alive()
        if self.server.refuse_adapters and "adapter_sha256" in spec.facts:
            self.server.refused_adapters += 1
            raise NamespaceError("the namespace table is full")
        digest = spec.digest()
        if digest not in self.server.digests:
            self.server.digests.append(digest)
            self.server.specs.append(json.loads(spec.to_json()))
        return Namespace(self.server.digests.index(digest), digest)

    def join(self, namespace_id, digest, layout_json, timeout_ms=1000):
        self._alive()
        spec = self.server.specs[namespace_id]
        if self.server.digests[namespace_id] != digest or spec["parts"][self.part]["layout"] != json.loads(layout_json):
            raise NamespaceError("another layout than the scheduler's")
        self.joins.append(digest)
        return Namespace(namespace_id, digest)

    def submit_lookup(self, ns, hashes):
        self._alive()
        self._has_room("lookup")
        return Pending(self.server, lambda: ReadLease(self.server, ns.digest, hashes))

    def submit_reserve(self, ns, hashes, *, first_block, parent=None, group=0):
        self._alive()
        self._has_room("reserve")
        assert (parent is None) == (first_block == 0)
        self.server.reserves.append((first_block, len(hashes)))
        return Pending(self.server, lambda: WriteLease(self.server, ns.digest, hashes, parent))

    def commit(self, lease_id, slots, words, sums=None, timeout_ms=100):
        self._answer("commit")
        assert self.role == "worker"
        for slot in slots.tolist():
            digest, key, parts = self.server.writing[slot]
            parts.add(self.part)
            if len(parts) == len(self.server.specs[0]["parts"]):
                self.server.blocks[digest, key] = (slot, self.server.word_of[slot])
                del self.server.writing[slot]
        return len(slots)

    def check(self, slots, words):
        self._alive()
        return np.array(
            [self.server.word_of[slot] == word for slot, word in zip(slots.tolist(), words.tolist(), strict=True)]
        )

    def part_sums(self, ns, group, slots):
        return np.zeros(len(slots), np.uint64)

    def check_sums(self, ns, group, slots, words):
        return np.zeros(len(slots), np.uint8)

    def distrust(self, slots, words, timeout_ms=100):
        return len(slots)

    def abort(self, lease_id, slots, words, timeout_ms=100):
        self._answer("abort")
        assert self.role == "worker"
        if lease_id in self.server.unknown_leases:
            raise LeaseError("no such lease")
        self.server.aborted += len(slots)
        return len(slots)

    def close(self):
        self.closed = True


class Namespace:
    def __init__(self, number, digest):
        self.id, self.digest = number, digest


class Pending:
    def __init__(self, server, make):
        self.server, self.make, self.abandoned = server, make, False

    def poll(self, moment_us=0):
        if self.server.gone:
            raise ServerLost("hang-up")
        return None if self.server.silent else self.make()

    def abandon(self):
        self.abandoned = True


class ReadLease:
    def __init__(self, server, digest, hashes):
        self.server, self.found, self.open = server, [], True
        for row in hashes:
            place = server.blocks.get((digest, row.tobytes()))
            if place is None:
                break
            self.found.append(place)
        self.tokens = len(self.found) * BLOCK
        server.leases += 1

    def slots(self, group=0):
        return np.array([slot for slot, _ in self.found], np.uint32)

    def words(self, group=0):
        return np.array([word for _, word in self.found], np.uint64)

    def first_block(self, group=0):
        return 0

    def release(self):
        self.server.released += self.open
        self.open = False


class WriteLease:
    ids = itertools.count(1)

    def __init__(self, server, digest, hashes, parent):
        self.server, self.lease_id, self.handed = server, next(self.ids), False
        answers, self.slots, self.words = [], np.zeros(len(hashes), np.uint32), np.zeros(len(hashes), np.uint64)

        def known(key):
            return (digest, key) in server.blocks or any(w[:2] == (digest, key) for w in server.writing.values())

        before = parent
        for i, row in enumerate(hashes):
            key = row.tobytes()
            if before is not None and not known(before):
                answers.append(Answer.NO_PARENT)
            elif (digest, key) in server.blocks:
                answers.append(Answer.PRESENT)
            elif known(key):
                answers.append(Answer.PENDING)
            elif server.next_slot >= server.capacity:
                answers.append(Answer.NO_SPACE)
            else:
                answers.append(Answer.GRANTED)
                self.slots[i], self.words[i] = server.grant(digest, key)
            before = key
        self.answers = np.array([int(a) for a in answers], np.uint8)

    def handed_over(self):
        self.handed = True

    def cancel(self):
        self.server.cancelled += 1


class FakePaged:
    """Copies rows of real tensors to and from the fake server's arena."""

    def __init__(self, tensors, *, num_blocks=None):
        self.tensors, self.num_blocks = dict(tensors), num_blocks
        self.block_bytes = sum(t[0].numel() * t.element_size() for t in self.tensors.values())

    def layout(self):
        return {"tensors": [{"name": name, "shape": list(t.shape[1:])} for name, t in self.tensors.items()]}

    lanes = None

    def record_event(self):
        return None

    def prepare(self, client):
        pass

    def forget(self, client):
        pass

    def trouble(self):
        return None

    def begin_store(self, client, ns, block_ids, slots, **kwargs):
        self.store(client, ns, block_ids, slots)
        return FakeCopy(None)

    def begin_load(self, client, ns, block_ids, slots, words, **kwargs):
        return FakeCopy(self.load(client, ns, block_ids, slots, words))

    def store(self, client, ns, block_ids, slots):
        assert client.role == "worker"
        for block, slot in zip(block_ids.tolist(), slots.tolist(), strict=True):
            rows = [t[block].clone() for t in self.tensors.values()]
            client.server.arena[slot, client.part] = rows

    def load(self, client, ns, block_ids, slots, words):
        ok = []
        for block, slot, word in zip(block_ids.tolist(), slots.tolist(), words.tolist(), strict=True):
            for tensor, row in zip(self.tensors.values(), client.server.arena[slot, client.part], strict=True):
                tensor[block] = row
            ok.append(client.server.word_of[slot] == word)
        return np.array(ok)


class FakeCopy:
    """A copy that has ended."""

    def __init__(self, good):
        self._good = good

    def has_ended(self):
        return True

    def wait(self):
        pass

    def good(self):
        return self._good


class FakePool:
    """vLLM's block pool, as far as references go."""

    def __init__(self, blocks: int = 100):
        self.blocks = [SimpleNamespace(block_id=i, ref_cnt=0) for i in range(blocks)]

    def touch(self, blocks):
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks):
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0

    @property
    def pinned(self):
        return sum(block.ref_cnt for block in self.blocks)


def block_hashes(tokens: list[int], width: int = 32) -> list[bytes]:
    """Chained hashes of the full blocks, as vLLM makes them."""
    hashes, parent = [], b"seed"
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hashlib.sha256(parent + repr(tokens[at : at + BLOCK]).encode()).digest()[:width]
        hashes.append(parent)
    return hashes


def request(req_id: str, tokens: list[int], **fields):
    """A request as the scheduler side sees it."""
    made = SimpleNamespace(
        request_id=req_id,
        block_hashes=block_hashes(tokens),
        num_tokens=len(tokens),
        num_prompt_tokens=len(tokens),
        lora_request=None,
        skip_reading_prefix_cache=False,
        resumable=False,
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def blocks_of(table: list[int]):
    """`KVCacheBlocks` of one group."""
    return SimpleNamespace(get_block_ids=lambda: (table,))


def step(tables: dict[str, list[int]], new=(), cached=()):
    """A `SchedulerOutput`: `new` and `cached` are (request id, computed tokens, scheduled tokens)."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=c) for r, c, _ in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[r for r, _, _ in cached],
            num_computed_tokens=[c for _, c, _ in cached],
            resumed_req_ids=set(),
        ),
        num_scheduled_tokens={r: n for r, _, n in (*new, *cached)},
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda r: (tables[r],) if r in tables else None),
        finished_req_ids=set(),
        preempted_req_ids=None,
        has_sync_kv_loads=False,
    )


def output(recv=(), failed=(), report=None, invalid=()):
    """A `KVConnectorOutput` as aggregated over the ranks."""
    return SimpleNamespace(
        finished_sending=None,
        finished_recving=set(recv) or None,
        failed_recving=set(failed),
        invalid_block_ids=set(invalid),
        kv_connector_worker_meta=report,
    )


def engine_config(folder: str, *, tp: int = 1, extra=None, role: str = "kv_both"):
    """A vLLM configuration, as far as the connector reads it."""
    hf_config = SimpleNamespace(to_dict=lambda: {"rope_theta": 10000.0, "hidden_size": 8, "_name_or_path": folder})
    return SimpleNamespace(
        max_concurrent_batches=1,
        model_config=SimpleNamespace(
            model=folder,
            revision=None,
            dtype="torch.float32",
            quantization=None,
            max_model_len=128,
            mm_processor_kwargs=None,
            hf_config=hf_config,
            seed=0,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(
            cache_dtype="auto", block_size=BLOCK, prefix_caching_hash_algo="sha256", enable_prefix_caching=True
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
        ),
        speculative_config=None,
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=extra or {},
            kv_role=role,
            is_kv_producer=True,
            kv_load_failure_policy="fail",
        ),
    )


def cache_config(num_blocks: int = 100, spec=None, groups: int = 1):
    """A KV-cache configuration with one full-attention layer a group."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = spec or FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    group = SimpleNamespace(layer_names=["layer.0"], kv_cache_spec=spec, enable_kv_transfer=True, host_resident=False)
    return SimpleNamespace(
        num_blocks=num_blocks,
        kv_cache_groups=[group] * groups,
        hash_block_size=BLOCK,
        kv_cache_layout="LBHNC",
        prefix_cacheable_group_ids=(0,),
    )
