"""Results for the eye: rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from .kl import Summary, path_note
from .layers import LayerSummary
from .operator import Row
from .schemes import Scheme
from .stats import Interval


def bits(value: float | None) -> str:
    """Bits with two decimals, or a dash where the cache does not count them."""
    return "-" if value is None else f"{value:.2f}"


def interval(value: Interval, digits: int = 4) -> str:
    """A value and its 95 % interval."""
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _label(scheme: Scheme, paths: Mapping[str, int]) -> str:
    note = path_note(scheme.kind, paths)
    return f"{scheme.label}\n  {note}" if note else scheme.label


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
            _label(row.scheme, row.paths),
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


def operator_table(title: str, rows: Sequence[Row], baseline: str) -> Table:
    """One row per scheme."""
    table = Table(title=title, title_justify="left")
    table.add_column("scheme", no_wrap=True)
    for name in ("true bits", "logits [95 %]", "output [95 %]", "KL, nats [95 %]", f"KL / {baseline}"):
        table.add_column(name, justify="right")
    for row in rows:
        errors = (interval(x) for x in (row.logits, row.output, row.kl))
        ratio = "-" if row.ratio is None else interval(row.ratio, 2)
        table.add_row(_label(row.scheme, row.paths), bits(row.true_bits), *errors, ratio)
    return table


def layer_table(title: str, rows: Sequence[LayerSummary], pooled: Mapping[str, Interval]) -> Table:
    """One row per layer, then the intervals of all of them pooled ("key", "value", "logits", "output")."""
    table = Table(title=title, title_justify="left")
    for name in ("layer", "path", "true bits", "key bits", "sd ln A", "K", "V", "logits", "output", "worst head", "KL"):
        table.add_column(name, justify="left" if name == "path" else "right")
    for row in rows:
        table.add_row(
            str(row.layer),
            row.path,
            bits(row.true_bits),
            bits(row.key_bits),
            f"{row.ln_a_sd:.2f}",
            *(f"{x:.3f}" for x in (row.key, row.value, row.logits, row.output)),
            f"{row.worst:.3f} ({row.worst_head})",
            f"{row.kl:.4f}",
        )
    table.add_section()
    errors = (interval(pooled[name], 3).replace(" ", "\n") for name in ("key", "value", "logits", "output"))
    table.add_row("all", "", "", "", "", *errors, "", "")
    return table
