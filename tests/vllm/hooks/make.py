"""Writes down what a vLLM release asks of a connector, for tests that have no such vLLM.

    python -m tests.vllm.hooks.make 0.34.0      # a new release
    python -m tests.vllm.hooks.make             # those stored, again: after kvmp imports something new from vLLM

It reads the release's source archive from the package index (`PIP_INDEX_URL`, `PIP_CERT`) and imports nothing of it.
"""

from __future__ import annotations

import sys

from tests.vllm.hooks import facts, sdist
from tests.vllm.hooks.tree import Tree
from tests.vllm.hooks.used import used_names


def main(versions: list[str]) -> None:
    for version in versions or facts.stored_versions():
        text = facts.dump(facts.gather(version, Tree(sdist.sources(version)), used_names()))
        path = facts.FOLDER / f"{version}.json"
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
