"""Tables of ``mixkvq bench kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..eval.stats import Interval
from .bars import break_even, cache_sheet, fastest, kernel_sheet, per_head
from .rows import Row, cells, times_faster
from .sheets import Sheet, context, number, spread

_HEAD = ("tokens", "system", "median us", "best us", "turns", "MB", "GB/s", "of read rate", "us / 1k / head", "error")


def _case(where: dict[str, Any]) -> tuple[int, int, int]:
    return where["head_dim"], where["group"], where["threads"]


def _title(case: tuple[int, int, int], heads: int) -> str:
    head_dim, group, threads = case
    return (
        f"head_dim {head_dim}, {heads} KV heads, {group} query head{'s' * (group > 1)} each, "
        f"{threads} thread{'s' * (threads > 1)}"
    )


def _grouped(rows: Sequence[Row]) -> dict[tuple[int, int, int], list[Row]]:
    found: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        found.setdefault(_case(row.where), []).append(row)
    return found


def all_rows(rows: Sequence[Row], machine: dict[str, Any]) -> list[Sheet]:
    """One sheet per head_dim, group and number of threads, one line per row."""
    sheets = []
    for case, part in _grouped(rows).items():
        rate = machine["read rate"].get(str(case[2]))
        known = f", read rate {rate / 1e9:.1f} GB/s" if rate else ""
        sheet = Sheet(_title(case, part[0].facts["heads"]) + known, _HEAD, left=2)
        for row in part:
            speed = row.facts["nbytes"] / row.median
            resident = row.facts["resident"] and not row.facts.get("in_cache")
            sheet.rows.append(
                [
                    context(row.where["tokens"]),
                    row.system + (" (cache resident)" if resident else ""),
                    number(row.median * 1e6),
                    number(row.best * 1e6),
                    str(len(row.taken)),
                    number(row.facts["nbytes"] / 1e6),
                    number(speed / 1e9),
                    f"{100 * speed / rate:.0f} %" if rate else "-",
                    number(per_head(row, row.median)),
                    f"{row.facts['error']:.0e}",
                ]
            )
        sheets.append(sheet)
    return sheets


_RIVALS: dict[str, dict[str, str]] = {
    "best torch fp32": {"role": "torch", "dtype": "fp32"},
    "best torch bf16": {"role": "torch", "dtype": "bf16"},
    "core fp32": {"role": "core", "dtype": "fp32"},
    "core bf16": {"role": "core", "dtype": "bf16"},
}


def _packed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.facts["role"] == "packed" and not row.facts.get("in_cache")]


def ratios(rows: Sequence[Row]) -> Sheet:
    """How many times faster packed records are than each kind of rival, everywhere."""
    head = ("head_dim", "group", "threads", "tokens", "system", *(f"{name} [95 %]" for name in _RIVALS))
    sheet = Sheet("Times faster than", head, left=5)
    for cell in cells(rows):
        found = list(cell.values())
        rivals = [fastest(found, **facts) for facts in _RIVALS.values()]
        for row in _packed(found):
            where = [str(row.where[k]) for k in ("head_dim", "group", "threads")]
            line = [*where, context(row.where["tokens"]), row.system]
            for rival in rivals:
                name = f" {rival.facts['formulation']}" if rival and "formulation" in rival.facts else ""
                line.append("-" if rival is None else spread(times_faster(row, rival)) + name)
            sheet.rows.append(line)
    return sheet


def break_evens(rows: Sequence[Row]) -> Sheet:
    """From how many tokens on packed records are faster than the fastest rival of each kind."""
    head = ("head_dim", "group", "threads", "system", *(f"than {name}" for name in _RIVALS), "than all of them")
    sheet = Sheet("Faster from how many tokens on", head, left=4)
    for case, part in _grouped(rows).items():
        found: dict[str, dict[str, list[tuple[int, Interval]]]] = {}
        for cell in cells(part):
            values = list(cell.values())
            rivals = [fastest(values, **facts) for facts in _RIVALS.values()]
            quickest = min((r for r in rivals if r), key=lambda r: r.median, default=None)
            for row in _packed(values):
                for name, rival in zip((*_RIVALS, "all"), (*rivals, quickest), strict=True):
                    if rival is not None:
                        length = row.where["tokens"], times_faster(row, rival)
                        found.setdefault(row.system, {}).setdefault(name, []).append(length)
        for system, by_rival in found.items():
            lengths = (by_rival.get(name) for name in (*_RIVALS, "all"))
            even = [break_even(sorted(x, key=lambda pair: pair[0])) if x else "-" for x in lengths]
            sheet.rows.append([str(case[0]), str(case[1]), str(case[2]), system, *even])
    return sheet


def sheets(rows: Sequence[Row], machine: dict[str, Any]) -> list[Sheet]:
    """All tables, the bars last."""
    found = [*all_rows(rows, machine), ratios(rows), break_evens(rows), cache_sheet(rows), kernel_sheet(rows)]
    return [sheet for sheet in found if sheet.rows]
