"""`Sheet`: a table for the terminal, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from ..eval.stats import Interval


@dataclass
class Sheet:
    """A table of text.

    Attributes
    ----------
    title : str
    head : sequence of str
    rows : list of rows
    left : int
        Columns from the left that hold words.
    """

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    left: int = 1

    def rich(self) -> Table:
        """For a rich console."""
        table = Table(title=self.title, title_justify="left", min_width=len(self.title))
        for i, name in enumerate(self.head):
            table.add_column(name, justify="left" if i < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.head))]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.head, *self.rows)]
        return "\n".join([f"**{self.title}**", "", lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def number(value: float, digits: int = 3) -> str:
    """A number with this many significant digits, thousands apart."""
    if value != value:
        return "-"
    places = max(digits - len(str(int(abs(value)))), 0)
    return f"{value:,.{places}f}"


def spread(value: Interval) -> str:
    """A value and its 95 % interval."""
    if value.low != value.low:
        return number(value.value)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def context(tokens: int) -> str:
    """Tokens, as 4k where they are."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
