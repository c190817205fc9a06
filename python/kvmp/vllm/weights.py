"""Whose weights: the identity of model and adapter files, from what the file system says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

# A safetensors header names every tensor with its type and shape; its length stands in the first 8 bytes.
_HEADER_BYTES = 64 * 1024
_CHUNK_BYTES = 1 << 20


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES)


def local_weights_digest(model: str) -> str | None:
    """SHA-256 over names, sizes, mtimes and headers of a local model's files; None when `model` is not a local path.

    Raises:
        OSError: a file cannot be read.
    """
    root = Path(model)
    if not root.exists():
        return None
    digest = hashlib.sha256()
    for path in _files(root) if root.is_dir() else (root,):
        status = path.stat()
        digest.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(_header(path))
    return digest.hexdigest()


def adapter_digest(folder: str) -> str:
    """SHA-256 over names and bytes of an adapter's files: engines hash only its name.

    Raises:
        OSError: there is no such folder here, it is empty, or a file cannot be read.
    """
    root = Path(folder)
    digest, found = hashlib.sha256(), False
    for path in _files(root):
        found = True
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    if not found:
        raise FileNotFoundError(f"no adapter files under {folder}")
    return digest.hexdigest()
