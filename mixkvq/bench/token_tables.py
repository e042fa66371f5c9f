"""Tables of ``mixkvq bench tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..eval.stats import Interval, median_interval
from .bars import DECODE_BAR, FLUSH_BAR, LEAST_DECODE, PREFILL_BAR, TOKENS_LENGTH
from .rows import Row, cells, times_faster
from .sheets import Sheet, context, number, spread
from .tokens import DECODE, FLUSH, PREFILL


def _cells(rows: Sequence[Row], phase: str) -> list[dict[str, Row]]:
    return cells(row for row in rows if row.where["phase"] == phase)


def _against_exact(cell: dict[str, Row], row: Row) -> Interval | None:
    """How many times faster than `DynamicCache` a packed cache is."""
    exact = next((other for other in cell.values() if other.facts["kind"] == "exact"), None)
    return times_faster(row, exact) if exact is not None and row.facts["kind"] == "packed" else None


def _tokens(row: Row) -> list[str]:
    return [context(row.where["tokens"]), str(row.where["threads"]), row.system]


def decode(rows: Sequence[Row]) -> Sheet:
    """Decoding."""
    head = (
        "tokens",
        "threads",
        "cache",
        "tokens/s",
        "median ms",
        "best ms",
        "steps",
        "packing",
        "GB/s",
        "ratio [95 %]",
    )
    sheet = Sheet("Decoding, one token at a time", head, left=3)
    for cell in _cells(rows, DECODE):
        for row in cell.values():
            ratio, moved = _against_exact(cell, row), row.facts["nbytes"] + row.facts["weights"]
            sheet.rows.append(
                [
                    *_tokens(row),
                    number(1 / row.median),
                    number(row.median * 1e3),
                    number(row.best * 1e3),
                    str(len(row.taken)),
                    str(len(row.facts["flushed"])),
                    number(moved / row.median / 1e9),
                    "-" if ratio is None else spread(ratio),
                ]
            )
    return sheet


def prefill(rows: Sequence[Row]) -> Sheet:
    """Time to the first token."""
    head = ("tokens", "threads", "cache", "median s", "best s", "readings", "tokens/s", "times as long [95 %]")
    sheet = Sheet("Reading the prompt", head, left=3)
    for cell in _cells(rows, PREFILL):
        for row in cell.values():
            ratio = _against_exact(cell, row)
            sheet.rows.append(
                [
                    *_tokens(row),
                    number(row.median),
                    number(row.best),
                    str(len(row.taken)),
                    number(row.where["tokens"] / row.median),
                    "-" if ratio is None else spread(_inverse(ratio)),
                ]
            )
    return sheet


def _inverse(ratio: Interval) -> Interval:
    return Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


def flush_ratio(row: Row) -> tuple[Interval, list[float], float]:
    """Median of the steps that packed over the median of the others, with its interval, and both, in seconds.

    The interval is that of the packing steps; the others are many.
    """
    flushed = set(row.facts["flushed"])
    packing = [t for i, t in enumerate(row.seconds) if i in flushed and t is not None]
    usual = float(np.median([t for i, t in enumerate(row.seconds) if i not in flushed and t is not None]))
    return median_interval(np.array(packing) / usual), packing, usual


def flush(rows: Sequence[Row]) -> Sheet:
    """Steps that pack."""
    head = ("tokens", "threads", "cache", "packing steps", "median ms", "worst ms", "usual ms", "ratio [95 %]")
    sheet = Sheet("Steps that pack a block in every layer", head, left=3)
    for row in (row for row in rows if row.where["phase"] == FLUSH and row.facts["flushed"]):
        ratio, packing, usual = flush_ratio(row)
        times = float(np.median(packing)) * 1e3, max(packing) * 1e3, usual * 1e3
        sheet.rows.append([*_tokens(row), str(len(packing)), *map(number, times), spread(ratio)])
    return sheet


def bars(rows: Sequence[Row]) -> Sheet:
    """What is promised of `MixKVQCache()`."""
    sheet = Sheet("Floors and targets of MixKVQCache()", ("what", "measured [95 %]", "floor", "target", "verdict"))

    def line(what: str, ratio: Interval, limits: tuple[float, float | None], verdict: str) -> None:
        target = "-" if limits[1] is None else number(limits[1])
        sheet.rows.append([what, spread(ratio), number(limits[0]), target, verdict])

    for cell in _cells(rows, DECODE):
        row = cell.get("default")
        ratio = _against_exact(cell, row) if row is not None else None
        if row is None or ratio is None:
            continue
        what = f"decoding at {context(row.where['tokens'])}, times faster than DynamicCache"
        if row.where["tokens"] == TOKENS_LENGTH:
            line(what, ratio, (DECODE_BAR.floor, DECODE_BAR.target), DECODE_BAR.verdict(ratio.value))
        else:
            reached = ratio.high if ratio.high == ratio.high else ratio.value
            line(what, ratio, (LEAST_DECODE, None), "meets floor" if reached >= LEAST_DECODE else "misses floor")
    for cell in _cells(rows, PREFILL):
        row = cell.get("default")
        ratio = _against_exact(cell, row) if row is not None else None
        if row is not None and ratio is not None:
            found = _inverse(ratio)
            what = f"reading {context(row.where['tokens'])}, times as long as DynamicCache"
            line(what, found, (PREFILL_BAR, None), "meets floor" if found.value <= PREFILL_BAR else "misses floor")
    for row in (
        row for row in rows if row.where["phase"] == FLUSH and row.system == "default" and row.facts["flushed"]
    ):
        found, packing, _ = flush_ratio(row)
        what = f"a packing step at {context(row.where['tokens'])} ({len(packing)} seen), times as long as the others"
        line(what, found, (FLUSH_BAR, None), "meets floor" if found.value <= FLUSH_BAR else "misses floor")
    return sheet


def sheets(rows: Sequence[Row], machine: dict[str, Any]) -> list[Sheet]:
    """All tables, the bars last."""
    return [sheet for sheet in (prefill(rows), decode(rows), flush(rows), bars(rows)) if sheet.rows]
