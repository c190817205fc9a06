"""The Python sources of one vLLM release, from the package index: read, never run, never unpacked to disk."""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import ssl
import tarfile
import urllib.request
from urllib.parse import urldefrag, urljoin

_INDEX = "https://pypi.org/simple"
_TIMEOUT_S = 180


def sources(version: str) -> dict[str, str]:
    """Module name -> source text. The source archive has 45 MB; a wheel with the same files has 300.

    Raises:
        LookupError: the index has no such archive, or it is not what the index says.
    """
    link, checksum = _link(version)
    archive = _read(link)
    if checksum and hashlib.sha256(archive).hexdigest() != checksum:
        raise LookupError(f"{link} has another sha256 than the index says; fetch it again")
    return dict(_modules(archive))


def _link(version: str) -> tuple[str, str]:
    """(address, sha256 or nothing) of the source archive."""
    page = os.environ.get("PIP_INDEX_URL", _INDEX).rstrip("/") + "/vllm/"
    for reference in re.findall(r'href="([^"]+)"', _read(page, accept="text/html").decode()):
        address, fragment = urldefrag(urljoin(page, html.unescape(reference)))
        if address.endswith(f"/vllm-{version}.tar.gz"):
            return address, fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
    raise LookupError(f"{page} has no source archive of vLLM {version}; give a released version, such as 0.33.0")


def _read(address: str, accept: str = "*/*") -> bytes:
    request = urllib.request.Request(address, headers={"Accept": accept})
    trusted = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=trusted) as answer:
        return answer.read()


def _modules(archive: bytes):
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        for file in files:
            path = file.name.partition("/")[2]
            if file.isfile() and path.startswith("vllm/") and path.endswith(".py"):
                yield path.removesuffix(".py").removesuffix("/__init__").replace("/", "."), _text(files, file)


def _text(files: tarfile.TarFile, file: tarfile.TarInfo) -> str:
    content = files.extractfile(file)
    return content.read().decode() if content is not None else ""
