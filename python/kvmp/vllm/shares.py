"""Which part of a slot each rank has: ranks whose KV is equal share one, which the lowest of them writes."""

from __future__ import annotations

from collections.abc import Sequence

from kvmp.vllm.metadata import PartMeta, Share


def share_parts(ranks: Sequence[PartMeta], width: int) -> tuple[Share, ...]:
    """The share of each rank, by index.

    Ranks that say they are equal, but differ in layout, size or facts, have a part each.

    Args:
        ranks: what the workers gave, by pipeline rank x `width` + tensor-parallel rank.
        width: tensor-parallel size.
    """
    shares: list[Share] = []
    while len(shares) < len(ranks):
        part = shares[-1].part + 1 if shares else 0
        alike = _alike(ranks, len(shares), width)
        shares.extend(Share(part, writes=place == 0) for place in range(alike))
    return tuple(shares)


def _alike(ranks: Sequence[PartMeta], first: int, width: int) -> int:
    """How many ranks from `first` on share a part."""
    equal = max(1, ranks[first].equal_ranks)
    if width % equal or first % width % equal:
        return 1
    alike = {_kv(rank) for rank in ranks[first : first + equal]}
    return equal if len(alike) == 1 else 1


def _kv(rank: PartMeta) -> tuple[int, int, str, str]:
    return rank.equal_ranks, rank.block_bytes, rank.layout_json, rank.facts_json
