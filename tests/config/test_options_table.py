"""README's table of options is the dataclass's own."""

import pytest

from tools.options_table import COMMAND, README, table, with_table


def test_readme_has_the_table_that_the_dataclass_makes():
    text = README.read_text()
    assert with_table(text) == text, f"README.md's table of options is out of date: run `{COMMAND}`"


def test_a_table_that_differs_is_replaced():
    text = README.read_text()
    assert with_table(text.replace("`KVMP_TIMEOUT_MS`", "`KVMP_TIMEOUT`")) == text
    assert "| `kvmp.timeout_ms` | `KVMP_TIMEOUT_MS` | 100 |" in table()


def test_a_lost_marker_is_named():
    with pytest.raises(ValueError, match="marker"):
        with_table(README.read_text().replace("<!-- end of options -->", ""))
