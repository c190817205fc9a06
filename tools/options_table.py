"""Writes the table of the connector's options in README.md, from the dataclass that reads them.

``.venv/bin/python tools/options_table.py`` rewrites the table between its markers; a test fails while README differs.
"""

from __future__ import annotations

from pathlib import Path

from kvmp.config.connector import connector_settings
from kvmp.config.setting import CONFIG_FILE, Setting

README = Path(__file__).parent.parent / "README.md"
COMMAND = ".venv/bin/python tools/options_table.py"
_BEGIN = f"<!-- options: written by `{COMMAND}` -->\n"
_END = "<!-- end of options -->\n"


def table() -> str:
    """The table, in Markdown."""
    head = "| key | environment variable | default | what it does |\n|---|---|---|---|\n"
    return head + "".join(map(_row, (*connector_settings(), CONFIG_FILE)))


def _row(setting: Setting) -> str:
    return f"| `{setting.key}` | `{setting.variable}` | {_default(setting.default)} | {setting.doc} |\n"


def _default(value: object) -> str:
    if value is None:
        return "none"
    return f"`{value}`" if isinstance(value, str) else str(value).lower()


def with_table(text: str) -> str:
    """README's text with the table as it should be.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"README.md has lost a marker: {_BEGIN!r} or {_END!r}")
    return before + begin + "\n" + table() + "\n" + end + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
