"""What kvmp's own sources take from vLLM, by their syntax: imported names, and attributes of what was imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[3] / "python" / "kvmp"


def used_names(folder: Path = SOURCES) -> list[str]:
    """Dotted names, such as ``vllm.v1.kv_cache_interface.FullAttentionSpec``."""
    return sorted({name for path in folder.rglob("*.py") for name in names_in(path.read_text())})


def names_in(source: str) -> set[str]:
    """The same for one file."""
    tree = ast.parse(source)
    imports = list(_imports(tree))  # the same name may come from two places, for two releases
    return {what for _, what in imports} | set(_attributes(tree, dict(imports)))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, what it names)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_vllm(node.module):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_vllm(alias.name):
                    yield alias.asname or alias.name, alias.name


def _is_vllm(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "vllm"


def _attributes(tree: ast.AST, local: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (owner := local.get(ast.unparse(node.value))):
            yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            of, name = node.args[:2]
            if (owner := local.get(ast.unparse(of))) and isinstance(name, ast.Constant):
                yield f"{owner}.{name.value}"
