"""What crosses between the scheduler side and the workers: frozen, plain, picklable.

Scheduler to workers, each step: `StepMeta`. Workers to scheduler: `PartMeta` once at start, `WorkerReport` when a store
has ended. A load's end travels in vLLM's own sets, counted by rank there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True)
class SessionRef:
    """The scheduler's session with a server, as a worker needs it to join.

    Attributes:
        endpoint: the socket the scheduler really used, ``unix:PATH``.
        engine_token: minted by the server for this session; a worker joins with it.
        server_epoch: one life of the server; stores are begun only under leases of this one.
        segment_id: identity of the segment's inode; slot words mean something only there.
    """

    endpoint: str
    engine_token: int
    server_epoch: int
    segment_id: str


@dataclass(frozen=True)
class NamespaceRef:
    """A namespace opened by the scheduler.

    Attributes:
        id: its number in the server.
        digest: its digest, 64 hex digits; a worker joins only this one.
    """

    id: int
    digest: str


@dataclass(frozen=True)
class Share:
    """What one rank has of every slot.

    Attributes:
        part: index of its part; ranks whose KV is equal have the same.
        writes: whether it is the one of them that stores the part. The others only load it.
    """

    part: int
    writes: bool = True


@dataclass(frozen=True, eq=False)
class LoadJob:
    """Blocks of one request to copy from slots into the engine's cache.

    Attributes:
        req_id: request whose load this is; every rank reports it exactly once.
        block_ids: engine blocks, int64 ``(n,)``.
        slots: slots, uint32 ``(n,)``.
        words: slot words of the lease, uint64 ``(n,)``.
        session: session the lease was taken in; None for a load that cannot be made and is only to be reported failed.
        namespace: namespace of the slots; None together with ``session``.
    """

    req_id: str
    block_ids: np.ndarray
    slots: np.ndarray
    words: np.ndarray
    session: SessionRef | None = None
    namespace: NamespaceRef | None = None


@dataclass(frozen=True, eq=False)
class StoreJob:
    """Engine blocks to copy into granted slots.

    Attributes:
        job_id: counts up in one engine; each rank that writes a part reports it once, with its part.
        lease_id: the write lease.
        block_ids: engine blocks, int64 ``(n,)``, pinned by the scheduler side until every part is reported.
        slots: slots, uint32 ``(n,)``.
        words: their words as granted, uint64 ``(n,)``.
        session: session the lease was granted in.
        namespace: namespace of the slots.
    """

    job_id: int
    lease_id: int
    block_ids: np.ndarray
    slots: np.ndarray
    words: np.ndarray
    session: SessionRef
    namespace: NamespaceRef


@dataclass(frozen=True, eq=False)
class StepMeta(KVConnectorMetadata):
    """One step's work for the workers.

    Attributes:
        session: the session in use now: workers join it early, and leave any other. None while there is no server,
            which says nothing: a worker stays where it is.
        namespace: the namespace of plain requests in it; None until it is open.
        loads: loads begun in this step.
        stores: stores handed over in this step.
        void_below: stores with a smaller job id are to be aborted, even when their copy has ended.
        cancelled_loads: loads that nobody wants any more: still reported, copied no further.
        shares: the ranks' shares, by pipeline rank x tensor-parallel size + tensor-parallel rank. They come from the
            scheduler side, which alone sees what every rank has.
    """

    session: SessionRef | None = None
    namespace: NamespaceRef | None = None
    loads: tuple[LoadJob, ...] = ()
    stores: tuple[StoreJob, ...] = ()
    void_below: int = 0
    cancelled_loads: frozenset[str] = frozenset()
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """The server refuses a worker in a namespace for as long as the session lasts.

    Attributes:
        session: the scheduler's session.
        namespace: the namespace the worker may not join.
        text: what the server said.
    """

    session: SessionRef
    namespace: NamespaceRef
    text: str


@dataclass(frozen=True)
class WorkerReport(KVConnectorWorkerMetadata):
    """What a worker has to say since the last step.

    Attributes:
        stores: job id -> part -> blocks whose part was committed (0: not stored).
        refusals: what the server refused a worker.
        closed: engine tokens with which a worker cannot go on: it left that session, or its part there is closed.
    """

    stores: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    refusals: frozenset[Refusal] = frozenset()
    closed: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.stores or self.refusals or self.closed)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Both reports as one; a part reported twice counts once."""
        if not isinstance(other, WorkerReport):
            return self
        stores = {job_id: dict(parts) for job_id, parts in self.stores.items()}
        for job_id, parts in other.stores.items():
            stores.setdefault(job_id, {}).update(parts)
        return WorkerReport(stores, self.refusals | other.refusals, self.closed | other.closed)


@dataclass(frozen=True)
class PartMeta(KVConnectorHandshakeMetadata):
    """What one worker says of its part when it starts.

    Attributes:
        rank: pipeline rank x tensor-parallel size + tensor-parallel rank.
        block_bytes: bytes of one block over all of this rank's layers.
        layout_json: digest of the part's canonical layout as a JSON object; the worker joins with this very text.
        facts_json: facts only a worker knows that hold for the whole engine, JSON with sorted keys.
        off: why this worker cannot take part, empty when it can.
        equal_ranks: how many consecutive tensor-parallel ranks, from a multiple of this number on, hold its very KV.
    """

    rank: int
    block_bytes: int = 0
    layout_json: str = "{}"
    facts_json: str = "{}"
    off: str = ""
    equal_ranks: int = 1
