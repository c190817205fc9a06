"""A gate that copies pass one block at a time, and that a test can close: one folder, two sides."""

import time
from pathlib import Path

FOLDER_VARIABLE = "KVMP_TEST_GATE"


class Gate:
    """Each copy notes itself in `passed`, and then waits for as long as `hold` is there."""

    def __init__(self, folder: Path):
        # With its slow copy the connector copies one block at a time, so that a hold is between two blocks.
        self.environment = {FOLDER_VARIABLE: str(folder), "KVMP_TEST_SLOW_COPY_MS": "1"}
        self._hold = folder / "hold"
        self._passed = folder / "passed"

    # ---- the test's side

    def hold(self) -> None:
        """From now on copies stop after their first block; counts start at zero."""
        self._passed.unlink(missing_ok=True)
        self._hold.touch()

    def open(self) -> None:
        self._hold.unlink(missing_ok=True)

    def passed(self, verb: str) -> int:
        """Blocks copied since the last hold; `verb` is `load` or `store`."""
        return self._passed.read_text().splitlines().count(verb) if self._passed.exists() else 0

    # ---- the copy's side

    def pass_through(self, verb: str) -> None:
        with self._passed.open("a") as passed:
            passed.write(f"{verb}\n")
        while self._hold.exists():
            time.sleep(0.005)
