"""Tables of ``mixkvq bench step``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bars import SHARE, STEP, STEP_GROUP, STEP_TOKENS, WHERE, Bar
from .rows import Row, cells, times_faster, times_faster_beyond
from .sheets import Sheet, context, number, spread
from .step import ATTENTION, EAGER, EMPTY

_PLACE = ("part", "head_dim", "group", "threads")


def all_rows(rows: Sequence[Row], machine: dict[str, Any]) -> Sheet:
    """One line per row."""
    head = (*_PLACE, "tokens", "cache", "median us", "best us", "turns", "less empty history, us", "cache MB", "GB/s")
    sheet = Sheet(f"One decode step, {rows[0].facts['layers']} layers, out of cache", head, left=6)
    for cell in cells(rows):
        base = cell[EMPTY].median
        for row in cell.values():
            own, nbytes = row.median - base, row.facts["nbytes"]
            speed = number(nbytes / own / 1e9) if own > 0 and nbytes else "-"
            paths = [path for path in row.facts.get("paths", ()) if path != "packed"]
            sheet.rows.append(
                [
                    *(str(row.where[k]) for k in _PLACE),
                    context(row.where["tokens"]),
                    row.system + (f" ({', '.join(paths)})" if paths else ""),
                    number(row.median * 1e6),
                    number(row.best * 1e6),
                    str(len(row.taken)),
                    number(own * 1e6) if row.system != EMPTY else "-",
                    number(nbytes / 1e6) if nbytes else "-",
                    speed,
                ]
            )
    return sheet


def ratios(rows: Sequence[Row]) -> Sheet:
    """Every packed cache against every other."""
    head = (*_PLACE, "tokens", "cache", "versus", "step [95 %]", "less empty history [95 %]")
    sheet = Sheet("Times faster than", head, left=7)
    for cell in cells(rows):
        packed = [row for row in cell.values() if row.facts["kind"] == "packed"]
        others = [row for row in cell.values() if row.facts["kind"] not in ("packed", "empty")]
        for row in packed:
            for rival in others:
                place = [*(str(row.where[k]) for k in _PLACE), context(row.where["tokens"])]
                attention = times_faster_beyond(row, rival, cell[EMPTY])
                line = [*place, row.system, rival.system, spread(times_faster(row, rival)), spread(attention)]
                sheet.rows.append(line)
    return sheet


def bars(rows: Sequence[Row]) -> Sheet:
    """Floors and targets of what a cache does in a step."""
    head = ("cache", "versus", "what", "times faster [95 %]", "by best", "floor", "target", "verdict")
    title = f"Floors and targets: head_dim 128, one thread, group {STEP_GROUP}, {context(STEP_TOKENS)} tokens"
    sheet = Sheet(title, head, left=3)
    place = {**WHERE, "group": STEP_GROUP, "tokens": STEP_TOKENS, "part": ATTENTION}
    for cell in cells(row for row in rows if row.where == place):
        for bar, preset in ((bar, preset) for bar in STEP for preset in SHARE if preset in cell):
            rival = _rival(bar, cell)
            if rival is not None:
                row, share = cell[preset], SHARE[preset]
                ratio, best = times_faster(row, rival), number(rival.best / row.best)
                limits = number(share * bar.floor), number(share * bar.target)
                verdict = bar.verdict(ratio.value, share)
                sheet.rows.append([preset, rival.system, ATTENTION, spread(ratio), best, *limits, verdict])
    return sheet


def _rival(bar: Bar, cell: dict[str, Row]) -> Row | None:
    """`DynamicCache` in the faster way of attending, or the cache that the bar names."""
    names = ("exact", EAGER) if bar.rival == "exact" else (bar.rival,)
    return min((cell[name] for name in names if name in cell), key=lambda row: row.median, default=None)


def sheets(rows: Sequence[Row], machine: dict[str, Any]) -> list[Sheet]:
    """All tables, the bars last."""
    return [sheet for sheet in (all_rows(rows, machine), ratios(rows), bars(rows)) if sheet.rows]
