"""docs/faults.md names tests that are there, and that run wherever the machine can run them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`([\w./-]+\.(?:rs|py))::(\w+)`")
NOT_RUN = re.compile(r"\b(?:skip|skipif|xfail|importorskip|skipTest)\b")
REASON = re.compile(r"""(?:reason=|\bskip\(|\bignore\s*=\s*)(['"])(.*?)\1""")


def test_every_promise_has_a_test_that_is_there_and_runs() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith(("| what", "|--"))]
    assert len(rows) > 20
    for row in rows:
        named = NAMED.findall(row)
        assert named, f"no test is named: {row}"
        for file, name in named:
            fault = fault_of(file, (ROOT / file).read_text(), name, row)
            assert not fault, f"{file}::{name} {fault}"


def fault_of(file: str, source: str, name: str, row: str) -> str:
    """What is wrong with a promise's test; one that is not run is right where `row` gives its reason word for word."""
    ways_out = list((_python if file.endswith(".py") else _rust)(source, name))
    if not ways_out:
        return "is no test, or is not there"
    for way_out in ways_out[1:]:
        reason = REASON.search(way_out)
        if not reason or reason[2] not in row:
            return f"is not always run, and the page does not say when: {way_out}"
    return ""


def _python(source: str, name: str) -> Iterator[str]:
    """The test's name, then every mark or call that may keep it from being run."""
    path = next(_paths_to(ast.parse(source), name), ())
    if not path or not name.startswith("test_"):
        return
    yield name
    yield from (text for node in path for text in _ways_out(node))


def _paths_to(node: ast.AST, name: str) -> Iterator[tuple[ast.AST, ...]]:
    """The module, the class if there is one, and the function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child.name == name:
            yield node, child
        elif isinstance(child, ast.ClassDef):
            yield from ((node, *path) for path in _paths_to(child, name))


def _ways_out(node: ast.AST) -> Iterator[str]:
    """Of a function all of it; of a module or class what is said outside of its functions."""
    parts: list[ast.AST] = [*getattr(node, "decorator_list", ())]
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    whole = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    parts += [part for part in node.body if whole or not isinstance(part, inner)]
    texts = (ast.unparse(_without_strings(part)) for part in parts)
    for part, text in zip(parts, texts, strict=True):
        if NOT_RUN.search(text):
            yield ast.unparse(part)


def _without_strings(part: ast.AST) -> ast.AST:
    """A copy in which no word is a string's."""

    class Blank(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("") if isinstance(node.value, str) else node

        def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Constant:
            return ast.Constant("")

    return Blank().visit(ast.parse(ast.unparse(part)))


def _rust(source: str, name: str) -> Iterator[str]:
    """The test's name, then every attribute that may keep it from being run."""
    found = re.search(rf"((?:^ *(?:#\[.*\]|//.*)\n)*)^ *(?:async )?fn {name}\b", source, re.MULTILINE)
    if not found or "#[test]" not in found[1]:
        return
    yield name
    yield from re.findall(r"#\[(?:ignore|cfg)\b.*\]", found[1])
    yield from re.findall(r"^#!\[cfg\b.*\]", source, re.MULTILINE)


RUN = {
    "a.py": [
        "@pytest.mark.parametrize('what', ['skip'])\ndef test_it(what):\n    'Nobody may skip it.'\n    assert what",
        "@pytest.mark.skip\ndef test_beside(): pass\ndef test_it(): pass",
    ],
    "a.rs": ["#[test]\nfn test_it() {}", "#[test]\n#[ignore]\nfn beside() {}\n\n/// It.\n#[test]\nfn test_it() {}"],
}
NOT_ALWAYS_RUN = {
    "a.py": [
        "@pytest.mark.skip\ndef test_it(): pass",
        "@pytest.mark.skipif(True, reason='flaky')\ndef test_it(): pass",
        "@mark.xfail(strict=False)\ndef test_it(): pass",
        "@pytest.mark.parametrize('n', [pytest.param(1, marks=pytest.mark.skip)])\ndef test_it(n): pass",
        "pytestmark = [pytest.mark.skip(reason='slow')]\ndef test_it(): pass",
        "torch = pytest.importorskip('torch')\ndef test_it(): pass",
        "@pytest.mark.skip\nclass TestAll:\n    def test_it(self): pass",
        "def test_it():\n    if slow():\n        pytest.skip('too slow')",
        "def it(): pass",
        "def test_another(): pass",
    ],
    "a.rs": [
        "#[test]\n#[ignore]\nfn test_it() {}",
        '#[ignore = "slow"]\n// Why.\n#[test]\nfn test_it() {}',
        '#[cfg(feature = "more")]\n#[test]\nfn test_it() {}',
        '#![cfg(feature = "more")]\n#[test]\nfn test_it() {}',
        "fn test_it() {}",
        "#[test]\nfn another() {}",
    ],
}


def _each(cases: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(file, source) for file, sources in cases.items() for source in sources]


@pytest.mark.parametrize(("file", "source"), _each(RUN))
def test_one_that_is_run_is_taken(file: str, source: str) -> None:
    assert fault_of(file, source, "test_it", "| a row |") == ""


@pytest.mark.parametrize(("file", "source"), _each(NOT_ALWAYS_RUN))
def test_one_that_is_not_always_run_is_refused(file: str, source: str) -> None:
    """The control."""
    assert fault_of(file, source, "test_it", "| a row |")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("a.py", "@pytest.mark.skipif(none(), reason='no CUDA device')\ndef test_it(): pass"),
        ("a.py", "def test_it():\n    if none():\n        pytest.skip('no CUDA device')"),
        ("a.rs", '#[test]\n#[ignore = "no CUDA device"]\nfn test_it() {}'),
    ],
)
def test_what_the_machine_lacks_must_be_on_the_page(file: str, source: str) -> None:
    assert fault_of(file, source, "test_it", "| a row |")
    assert fault_of(file, source, "test_it", "| a row (not where there is no CUDA device) |") == ""
