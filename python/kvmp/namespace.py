"""Identity: a namespace spec is everything that shapes KV bytes; two engines share exactly what has one digest.

The digest is made in Rust only (SHA-256 over the spec as JSON with sorted keys and the layout version), so that no
two writers of this module can disagree about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """One KV-cache group.

    Attributes:
        block_tokens: tokens in one block of this group.
        rule: which blocks a hit needs: ``"prefix"`` (all), ``"window"`` (the last ``window_tokens``), ``"state"`` (the
            one that ends at the hit).
        window_tokens: tokens of the window; only with rule ``"window"``.
        hash_stride: this group's key is every ``hash_stride``-th hash of a hash list.
    """

    block_tokens: int
    rule: str = "prefix"
    window_tokens: int = 0
    hash_stride: int = 1


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """What one rank writes of a slot.

    Attributes:
        bytes: bytes of one block of each group, in the order of the groups.
        layout: what shapes this part's bytes, as JSON values: canonical strides, dtypes and per-layer specs, or a
            digest of them, for a whole spec must fit an entry of 16 KiB in the segment.
    """

    bytes: tuple[int, ...]
    layout: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class NamespaceSpec:
    """Everything that shapes the bytes of a namespace's blocks.

    Attributes:
        model: the model's id or path.
        facts: every other thing that shapes the bytes, as JSON values; the order of the keys does not matter.
        groups: the KV-cache groups.
        parts: the parts, one a writer.
        salt: fresh and random after a ``reset_cache``, empty otherwise.
    """

    model: str
    facts: Mapping[str, Any]
    groups: tuple[GroupSpec, ...]
    parts: tuple[PartSpec, ...]
    salt: str = ""

    def to_json(self) -> str:
        """The spec as the JSON text that the Rust side parses."""
        return json.dumps(
            {
                "model": self.model,
                "facts": dict(self.facts),
                "groups": [asdict(group) for group in self.groups],
                "parts": [{"bytes": list(part.bytes), "layout": dict(part.layout)} for part in self.parts],
                "salt": self.salt,
            }
        )

    def digest(self) -> str:
        """SHA-256 of the canonical spec, as 64 hex digits.

        Raises:
            NamespaceError: the spec is refused; the text names the field.
        """
        from kvmp import _kvmp

        return _kvmp.namespace_digest(self.to_json())
