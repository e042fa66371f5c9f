"""Results of what models do, for the eye: rich tables of greedy continuations, recall and tasks."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .generate import Summary as GreedySummary
from .recall import Summary as RecallSummary
from .scores import Score
from .stats import Interval
from .tables import bits, interval


def change(value: Interval, digits: int = 3) -> str:
    """A signed value and its 95 % interval."""
    return f"{value.value:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("scheme", no_wrap=True)
    for name in ("true bits", "effective", *columns):
        table.add_column(name, justify="right")
    return table


def recall_table(title: str, rows: Sequence[RecallSummary]) -> Table:
    """One row per scheme; rows of one task and length."""
    table = _table(title, "right", "change [95 %]", "ln p(answer)", "change [95 %]")
    for row in rows:
        exact = row.scheme.kind == "exact"
        table.add_row(
            row.scheme.label,
            bits(row.true_bits),
            bits(row.effective_bits),
            f"{row.right.value:.3f}",
            "-" if exact else change(row.right_change),
            f"{row.log_probability.value:.2f}",
            "-" if exact else change(row.log_change, 2),
        )
    return table


def greedy_table(title: str, rows: Sequence[GreedySummary], baseline: str) -> Table:
    """One row per scheme."""
    columns = ("identical [95 %]", "tokens until they part, mean [95 %]", "median", f"mean less {baseline}'s [95 %]")
    table = _table(title, *columns)
    for row in rows:
        table.add_row(
            row.scheme.label,
            bits(row.true_bits),
            bits(row.effective_bits),
            interval(row.identical, 3),
            interval(row.kept, 1),
            f"{row.median:.0f}",
            change(row.kept_change, 1),
        )
    return table


def score_table(title: str, rows: Sequence[Score]) -> Table:
    """One row per scheme; rows of one task, metric and filter."""
    table = _table(title, "value [95 %]", "change [95 %]")
    for row in rows:
        table.add_row(
            row.scheme.label,
            bits(row.true_bits),
            bits(row.effective_bits),
            f"{row.value:.4f}" if row.interval is None else interval(row.interval, 3),
            "-" if row.change is None or row.scheme.kind == "exact" else change(row.change),
        )
    return table


def score_tables(title: str, rows: Sequence[Score]) -> list[Table]:
    """A table for every metric."""
    metrics = dict.fromkeys(row.metric for row in rows)
    return [score_table(f"{title}: {metric}", [row for row in rows if row.metric == metric]) for metric in metrics]
