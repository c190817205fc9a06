"""docs/faults.md names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`([\w./-]+\.(?:rs|py))::(\w+)`")


def test_every_promise_has_a_test_that_is_there() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith(("| what", "|--"))]
    assert len(rows) > 20
    for row in rows:
        named = NAMED.findall(row)
        assert named, f"no test is named: {row}"
        for file, name in named:
            source = (ROOT / file).read_text()
            assert re.search(rf"^ *(?:async )?(?:def|fn) {name}\b", source, re.MULTILINE), f"{file} has no {name}"
