"""What vLLM's offloading flags say: ``--kv-offloading-size``, ``--kv-offloading-backend`` and what goes with them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .setting import refused

BACKENDS = ("native", "lmcache", "kvmp")
GIB = 2.0**30  # bytes; a float, as vLLM multiplies
SIMPLE_VARIABLE = "VLLM_USE_SIMPLE_KV_OFFLOAD"


@dataclass(frozen=True)
class OffloadingConfig:
    """The flags that decide which connector is used.

    Attributes:
        size_gib: size of the offloading buffer of all ranks together, GiB; ``None`` switches offloading off, and the
            backend is then ignored.
        backend: ``"native"``, ``"lmcache"`` or ``"kvmp"``.
        tensor_parallel_size: ranks of tensor parallelism; the size is never divided by it.
        pipeline_parallel_size: ranks of pipeline parallelism; the size is never divided by it.
        chunked_prefill: whether vLLM computes prompts in chunks.
        simple: whether ``"native"`` means vLLM's ``SimpleCPUOffloadConnector``.

    Raises:
        ConfigError: an unknown backend, a size that is no finite number above zero, or a value of a wrong type.
    """

    size_gib: float | None
    backend: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    chunked_prefill: bool = False
    simple: bool = False

    def __post_init__(self) -> None:
        if self.size_gib is not None:
            _check_size(self.size_gib)
            _check_backend(self.backend)
        _check_ranks("tensor_parallel_size", self.tensor_parallel_size)
        _check_ranks("pipeline_parallel_size", self.pipeline_parallel_size)
        _check_flag("chunked_prefill", self.chunked_prefill)
        _check_flag("simple", self.simple)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **fields: Any) -> OffloadingConfig:
        """The flags, with ``simple`` as the environment says: the only place where it is read.

        Args:
            environ: the environment; the process's own when not given.
            fields: every other field.

        Raises:
            ConfigError: as for the class; or ``VLLM_USE_SIMPLE_KV_OFFLOAD`` is no whole number: vLLM fails on it too.
        """
        text = (os.environ if environ is None else environ).get(SIMPLE_VARIABLE, "0")
        try:
            simple = bool(int(text))  # vLLM's own rule
        except ValueError as error:
            raise refused(SIMPLE_VARIABLE, text, "a whole number: 0 for off, 1 for on") from error
        return cls(**fields, simple=simple)

    @property
    def size_bytes(self) -> float:
        """``size_gib`` in bytes; 0 when offloading is off."""
        return float(self.size_gib or 0) * GIB


def _check_size(size: object) -> None:
    number = isinstance(size, Real) and not isinstance(size, bool)
    if not (number and _is_above_zero(size)):
        raise refused("size_gib", size, "a finite number of GiB above zero, or None for no offloading")


def _is_above_zero(size: Any) -> bool:
    try:
        return math.isfinite(float(size) * GIB) and size > 0
    except OverflowError:  # a whole number that no float can hold
        return False


def _check_backend(backend: object) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise refused("backend", backend, " or ".join(map(repr, BACKENDS)), BACKENDS)


def _check_ranks(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(name, value, "a whole number of ranks from 1 up")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise refused(name, value, "True or False")
