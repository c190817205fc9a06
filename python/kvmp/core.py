"""Pieces of the server's core as classes, in this process: to test, replay and reuse.

- :class:`Ring`: one side of a session's shared-memory ring, two queues of 64-byte entries and a scratch area.
- :class:`BlockIndex`: the block store (index, leases, eviction) over records in private memory. Its answers are those
  of a server in the same state; time is an argument, so that a run can be replayed.
- :class:`Policy`: an eviction policy over the slots of one size; :func:`policies` names them.

Hashes are uint8 ``(n, 32)``, slots uint32 ``(n,)``, slot words uint64 ``(n,)``, times in seconds from any start.
"""

from ._kvmp import BlockIndex, IndexGrant, IndexHit, Policy, Ring, policies

__all__ = ["BlockIndex", "IndexGrant", "IndexHit", "Policy", "Ring", "policies"]
