"""What a check found: one line for a person, with the mend where there is one."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """kvmp works, but not as well as it could, or not yet."""
    FAIL = "FAIL"
    """kvmp does not work here until this is mended."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    what: str
    """What was looked at, a few words."""
    says: str
    mend: str = ""
    """The command or setting that mends it; empty when nothing is to be done."""

    def lines(self) -> Iterable[str]:
        """The text of the report."""
        yield f"{self.level.value:<5} {self.what:<16} {self.says}"
        if self.mend:
            yield f"{'':<22} mend: {self.mend}"


def ok(what: str, says: str) -> Finding:
    return Finding(Level.OK, what, says)


def warn(what: str, says: str, mend: str = "") -> Finding:
    return Finding(Level.WARN, what, says, mend)


def fail(what: str, says: str, mend: str) -> Finding:
    return Finding(Level.FAIL, what, says, mend)
