"""What vLLM's modules and classes define, by their syntax alone: nothing of vLLM is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Tree:
    """One release's sources, parsed where asked."""

    def __init__(self, sources: dict[str, str]):
        self._sources = sources
        self._parsed: dict[str, ast.Module] = {}

    def is_module(self, name: str) -> bool:
        return name in self._sources

    def module(self, name: str) -> ast.Module:
        if name not in self._parsed:
            self._parsed[name] = ast.parse(self._sources[name])
        return self._parsed[name]

    def defines(self, module: str, name: str) -> bool:
        """Whether `from module import name` works, as far as the sources tell."""
        if self.is_module(f"{module}.{name}"):
            return True
        if not self.is_module(module):
            return False
        for statement in _statements(self.module(module).body):
            if name in _bound(statement) or self._through_a_star(module, statement, name):
                return True
        return self._by_getattr(module, name)

    def _through_a_star(self, module: str, statement: ast.stmt, name: str) -> bool:
        star = isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names)
        return star and not name.startswith("_") and self.defines(self.imported(module, statement), name)

    def _by_getattr(self, module: str, name: str) -> bool:
        """A module may make names when asked (`vllm`, `vllm.platforms`): it then spells them as strings."""
        body = self.module(module)
        lazy = any(isinstance(s, Function) and s.name == "__getattr__" for s in body.body)
        return lazy and any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(body))

    def imported(self, module: str, statement: ast.ImportFrom) -> str:
        """The module that a `from` statement names."""
        if not statement.level:
            return statement.module or ""
        package = module if any(m.startswith(module + ".") for m in self._sources) else module.rpartition(".")[0]
        parents = package.split(".")
        base = parents[: len(parents) - statement.level + 1]
        return ".".join([*base, statement.module] if statement.module else base)

    def find_class(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """(module, class), followed through imports; None where it is no class of this tree."""
        if not self.is_module(module):
            return None
        for statement in _statements(self.module(module).body):
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return module, statement
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self.find_class(self.imported(module, statement), alias.name)
        return None

    def lineage(self, module: str, name: str) -> list[ast.ClassDef]:
        """The class and what it inherits from inside this tree, the most basic first."""
        found = self.find_class(module, name)
        if found is None:
            return []
        home, node = found
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return [ancestor for base in reversed(bases) for ancestor in self.lineage(home, base)] + [node]


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module or class is made, those under `if` and `try` too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(statement.test):
                yield from _statements(statement.body)
            yield from _statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [handled for handler in statement.handlers for handled in handler.body]
            yield from _statements([*statement.body, *handlers, *statement.orelse, *statement.finalbody])


def _bound(statement: ast.stmt) -> set[str]:
    """Names that one statement binds."""
    if isinstance(statement, Function | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and statement.value is not None and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return set()


def members(node: ast.ClassDef) -> Iterator[tuple[str, ast.stmt]]:
    """(name, statement) of what a class body binds."""
    for statement in _statements(node.body):
        for name in _bound(statement):
            yield name, statement
