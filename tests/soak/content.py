"""What the soak's engines store: chains of hashes that share heads, and bytes that follow from hash and part alone."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from kvmp.namespace import GroupSpec, NamespaceSpec, PartSpec

PARTS = 2
PART_BYTES = 64 << 10
LAYOUT = '{"kind": "soak"}'
CHAINS = 120
_SHARED = 4  # chains that have their head in common


def spec() -> NamespaceSpec:
    part = PartSpec(bytes=(PART_BYTES,), layout={"kind": "soak"})
    return NamespaceSpec(model="soak", facts={}, groups=(GroupSpec(block_tokens=16),), parts=(part,) * PARTS)


def chain(number: int, blocks: int) -> NDArray[np.uint8]:
    """The hashes ``(blocks, 32)`` of a chain; four chains each are alike in their first half."""
    hashes, before = [], b""
    for block in range(blocks):
        of = number // _SHARED if block < blocks // 2 else number
        before = hashlib.sha256(before + f"{of} {block}".encode()).digest()
        hashes.append(before)
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(blocks, 32)


def part_of(block_hash: bytes, part: int) -> NDArray[np.uint8]:
    """The bytes ``(PART_BYTES,)`` of one part of the block with this hash."""
    digest = np.frombuffer(hashlib.sha256(block_hash + bytes([part])).digest(), np.uint8)
    return np.tile(digest, PART_BYTES // 32)
