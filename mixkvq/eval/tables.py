"""Results for the eye: rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .kl import Summary
from .stats import Interval


def bits(value: float | None) -> str:
    """Bits with two decimals, or a dash where the cache does not count them."""
    return "-" if value is None else f"{value:.2f}"


def interval(value: Interval, digits: int = 4) -> str:
    """A value and its 95 % interval."""
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def kl_table(title: str, rows: Sequence[Summary], baseline: str | None) -> Table:
    """One row per scheme."""
    table = Table(title=title, title_justify="left")
    table.add_column("scheme", no_wrap=True)
    for name in ("true bits", "effective", "KL, nats [95 %]", "p99 KL", "NLL change", "top-1"):
        table.add_column(name, justify="right")
    if baseline is not None:
        table.add_column(f"KL / {baseline}", justify="right")
    for row in rows:
        cells = [
            f"{row.scheme.label}\n  {row.note}" if row.note else row.scheme.label,
            bits(row.true_bits),
            bits(row.effective_bits),
            interval(row.kl),
            f"{row.p99:.3f}",
            f"{row.nll_change.value:+.4f}",
            f"{row.agreement.value:.3f}",
        ]
        if baseline is not None:
            cells.append("-" if row.ratio is None else interval(row.ratio, 2))
        table.add_row(*cells)
    return table
