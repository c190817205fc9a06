"""What the demo found, a row a prompt."""

from dataclasses import dataclass

from .engine import Output

_HEAD = """\
                    found in kvmp          time to first token, ms           greedy tokens
 prompt  tokens     tokens   share     cold  recomputed  from kvmp          as without kvmp"""
_RULE = " " + "─" * 88


@dataclass(frozen=True)
class Row:
    """One prompt in three engines."""

    prompt: list[int]
    cold: Output
    """Engine 1, which computed it and stored its KV."""
    recomputed: Output
    """An engine without kvmp."""
    found: Output
    """Engine 2, started after engine 1 was killed."""

    @property
    def equal(self) -> bool:
        return self.cold.tokens == self.found.tokens == self.recomputed.tokens

    @property
    def times_sooner(self) -> float:
        return self.recomputed.ttft_s / self.found.ttft_s


def render(rows: list[Row]) -> str:
    """The table, and one line that sums it up."""
    lines = [_line(number, row) for number, row in enumerate(rows, 1)]
    return "\n".join([_HEAD, _RULE, *lines, _RULE, _summary(rows)])


def _line(number: int, row: Row) -> str:
    tokens, found = len(row.prompt), row.found.cached_tokens
    times = f"{_ms(row.cold)}      {_ms(row.recomputed)}     {_ms(row.found)} {f'({row.times_sooner:.0f}x)':>6}"
    verdict = "equal" if row.equal else "DIFFERENT"
    return f" {number:>6}  {tokens:>6,}     {found:>6,}  {found / tokens:>6.1%}  {times}  {verdict:>14}"


def _ms(output: Output) -> str:
    return f"{output.ttft_s * 1000:>6,.0f}"


def _summary(rows: list[Row]) -> str:
    found, tokens = sum(row.found.cached_tokens for row in rows), sum(len(row.prompt) for row in rows)
    equal = sum(row.equal for row in rows)
    return (
        f" Engine 2 found {found:,} of {tokens:,} tokens ({found / tokens:.1%}); {equal} of {len(rows)} answers equal."
    )
