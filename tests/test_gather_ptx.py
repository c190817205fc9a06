"""The gather kernel's PTX is what its source gives. ``python -m tests.test_gather_ptx`` makes it anew.

NVRTC needs no GPU; torch brings it, for its own kernels, and pins its release. One that makes other code of the same
source fails this too: then the kernel must be made anew and run on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "rust" / "kvmp-cuda" / "src" / "gather.cu"
PTX = SOURCE.with_suffix(".ptx")

_WHEEL = "nvidia-cuda-nvrtc"
_GPUS = b"--gpu-architecture=compute_75"  # Turing and later
_DRIVERS = ".version 7.8"  # CUDA 11.8 and later; NVRTC writes the newest that it knows, and uses nothing of it


def _library(prefix: str) -> str:
    names = [file for file in distribution(_WHEEL).files or [] if file.name.startswith(prefix)]
    return str(min(names, key=lambda file: len(file.name)).locate())


class Nvrtc:
    """The compiler as a library."""

    def __init__(self) -> None:
        ctypes.CDLL(_library("libnvrtc-builtins.so"))  # looked for by name when it is needed
        self._library = ctypes.CDLL(_library("libnvrtc.so"))

    def _call(self, function: str, *arguments: object) -> int:
        return int(getattr(self._library, f"nvrtc{function}")(*arguments))

    def _text(self, what: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        assert self._call(f"Get{what}Size", program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert self._call(f"Get{what}", program, text) == 0
        return text.value.decode()

    def ptx(self, source: str) -> str:
        """What it makes of the source, for kvmp's GPUs and drivers."""
        program, options = ctypes.c_void_p(), (ctypes.c_char_p * 1)(_GPUS)
        assert self._call("CreateProgram", ctypes.byref(program), source.encode(), b"gather.cu", 0, None, None) == 0
        try:
            assert self._call("CompileProgram", program, 1, options) == 0, self._text("ProgramLog", program)
            made, count = re.subn(r"^\.version .*$", _DRIVERS, self._text("PTX", program), flags=re.MULTILINE)
            assert count == 1
            return made
        finally:
            self._call("DestroyProgram", ctypes.byref(program))


def code_of(ptx: str) -> list[str]:
    """Its lines but comments, which say what made it."""
    return [line for line in ptx.splitlines() if line.strip() and not line.lstrip().startswith("//")]


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    try:
        return Nvrtc()
    except PackageNotFoundError:
        must_not_skip = os.environ.get("KVMP_MUST_NOT_SKIP", "").split(",")
        assert not {"compiler", "1"} & set(must_not_skip), f"{_WHEEL} is not installed"
        pytest.skip(f"{_WHEEL} is not installed: it comes with torch of PyPI")


def test_the_kernel_is_what_its_source_gives(nvrtc: Nvrtc) -> None:
    made = nvrtc.ptx(SOURCE.read_text())
    told = f"{_WHEEL} {distribution(_WHEEL).version} makes other code of gather.cu, whose head says what to do"
    assert code_of(made) == code_of(PTX.read_text()), told


def test_the_comparison_tells_another_source(nvrtc: Nvrtc) -> None:
    """Negative control."""
    other = SOURCE.read_text().replace("__ldcv", "__ldcg")
    assert code_of(nvrtc.ptx(other)) != code_of(PTX.read_text())


if __name__ == "__main__":
    PTX.write_text(Nvrtc().ptx(SOURCE.read_text()))
