"""What kvmp needs to know of one vLLM release: hooks and their signatures, configuration fields, names it imports.

A parameter is one string: ``name`` needs a value, ``name=`` has a default, ``*name`` and ``**name`` take any number,
what follows ``*`` goes by keyword only and what precedes ``/`` by position only. ``self`` and ``cls`` are left out.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.vllm.hooks.tree import Function, Tree, members

FOLDER = Path(__file__).parent
CLASSES = {
    "KVConnectorBase_V1": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "SupportsHMA": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorFactory": "vllm.distributed.kv_transfer.kv_connector.factory",
}
TRANSFER_CONFIG = ("vllm.config.kv_transfer", "KVTransferConfig")
# Methods of vLLM's in whose frames the connector looks something up while they call it (`compat.py`).
CALLERS = {
    "EngineCore._initialize_kv_caches": "vllm.v1.engine.core",
    "MultiConnector.__init__": "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector",
    "MultiConnector.get_required_kvcache_layout": "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector",
}


def load(version: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{version}.json").read_text())


def stored_versions() -> list[str]:
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda v: [int(part) for part in v.split(".")])


def gather(version: str, tree: Tree, names: Iterable[str]) -> dict[str, Any]:
    """All facts of one release."""
    return {
        "version": version,
        "classes": {name: class_hooks(tree, module, name) for name, module in CLASSES.items()},
        "attributes": _attributes(tree, CLASSES["KVConnectorBase_V1"], "KVConnectorBase_V1"),
        "transfer_config": _fields(tree, *TRANSFER_CONFIG),
        "names": {name: exists(tree, name) for name in names},
        "callers": {name: caller(tree, module, name) for name, module in CALLERS.items()},
    }


def dump(facts: dict[str, Any]) -> str:
    """JSON with a line for each hook and name, so that two releases can be compared with `diff`."""
    return _lines(facts, 3 * (" ",)) + "\n"


def _lines(value: Any, depth: tuple[str, ...], indent: str = "") -> str:
    if not isinstance(value, dict) or not depth or (value and "kind" in value):
        return json.dumps(value, sort_keys=True)
    inner = indent + depth[0]
    lines = [f"{inner}{json.dumps(key)}: {_lines(value[key], depth[1:], inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


# Hooks.


def is_told(name: str, is_function: bool) -> bool:
    """The constructor, whatever is public, and values with one underscore, which subclasses may set."""
    if name.startswith(("__", "_abc_")):
        return name == "__init__"
    return not (is_function and name.startswith("_"))


def class_hooks(tree: Tree, module: str, name: str) -> dict[str, Any]:
    """Name -> what it is, the subclass's last."""
    hooks = {}
    for node in tree.lineage(module, name):
        for name, statement in members(node):
            if is_told(name, isinstance(statement, Function)):
                hooks[name] = _hook(statement)
    return hooks


def _hook(statement: ast.stmt) -> dict[str, Any]:
    if not isinstance(statement, Function):
        return {"kind": "value"}
    decorators = {ast.unparse(decorator) for decorator in statement.decorator_list}
    kinds = [kind for kind in ("property", "classmethod", "staticmethod") if kind in decorators]
    kind = kinds[0] if kinds else "method"
    hook: dict[str, Any] = {"kind": kind}
    if kind != "property":
        hook["parameters"] = _parameters(statement.args)[kind != "staticmethod" :]
    if decorators & {"abstractmethod", "abc.abstractmethod"}:
        hook["abstract"] = True
    return hook


def _parameters(arguments: ast.arguments) -> list[str]:
    by_position = [*arguments.posonlyargs, *arguments.args]
    needed = len(by_position) - len(arguments.defaults)
    texts = [a.arg + ("=" if i >= needed else "") for i, a in enumerate(by_position)]
    if arguments.posonlyargs:
        texts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        texts.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        texts.append("*")
    defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    texts += [a.arg + ("=" if default is not None else "") for a, default in defaults]
    return [*texts, "**" + arguments.kwarg.arg] if arguments.kwarg else texts


def _attributes(tree: Tree, module: str, name: str) -> list[str]:
    """What the constructor sets on `self`."""
    found = set()
    for node in tree.lineage(module, name):
        for method in node.body:
            if isinstance(method, Function) and method.name == "__init__":
                found |= {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute) and _is_stored_on_self(n)}
    return sorted(found)


def _is_stored_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


# Callers.


def caller(tree: Tree, module: str, name: str) -> dict[str, list[str]]:
    """The names that a method binds, and what it calls, in the order of its text.

    Raises:
        LookupError: there is no such method.
    """
    kind, _, method = name.rpartition(".")
    bodies = (dict(members(node)) for node in tree.lineage(module, kind))
    node = next((body[method] for body in bodies if method in body), None)
    if node is None:
        raise LookupError(f"{module} has no {name}: see in compat.py what kvmp looks up there, and where it is now")
    nodes = sorted((n for n in ast.walk(node) if hasattr(n, "lineno")), key=lambda n: (n.lineno, n.col_offset))
    bound = {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    called = [ast.unparse(n.func).rpartition(".")[2] for n in nodes if isinstance(n, ast.Call)]
    return {"binds": sorted(bound), "calls": list(dict.fromkeys(called))}


# Configuration.


def _fields(tree: Tree, module: str, name: str) -> dict[str, str]:
    fields = {}
    for node in tree.lineage(module, name):
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
                fields[ast.unparse(statement.target)] = "has a default" if _has_default(statement.value) else "required"
    return fields


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func).lower().endswith("field"):
        return bool(value.args) or any(k.arg in ("default", "default_factory") for k in value.keywords)
    return value is not None


# Names that kvmp uses.


def exists(tree: Tree, name: str) -> bool | None:
    """Whether this dotted name is there; None for an attribute of an object, which sources do not tell."""
    owner, _, last = name.rpartition(".")
    if not owner:
        return tree.is_module(name)
    if tree.is_module(owner) or not tree.defines(*_split(owner)):
        return tree.defines(owner, last)
    lineage = tree.lineage(*_split(owner))
    return any(last in dict(members(node)) for node in lineage) if lineage else None


def _split(name: str) -> tuple[str, str]:
    owner, _, last = name.rpartition(".")
    return owner, last
