"""Floors and targets that the kernels are measured by: one thread, 8 KV heads, head_dim 128."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..eval.stats import Interval
from .rows import Row, cells, times_faster
from .sheets import Sheet, context, number, spread

WHERE = {"head_dim": 128, "threads": 1}
SHARE = {"compact": 1.0, "default": 0.75}
"""Which part of a bar a preset has to reach."""

_LIMITS = ("floor", "target", "verdict")

SHORTEST, SHORTEST_IN_CACHE = 4096, 1024
"""Tokens from which on bars hold."""


@dataclass(frozen=True)
class Bar:
    """How many times faster than a rival attention has to be (floor) and is meant to be (target)."""

    rival: str
    floor: float
    target: float

    def verdict(self, value: float, share: float = 1.0) -> str:
        """What a ratio reaches."""
        if value >= share * self.target:
            return "meets target"
        return "meets floor" if value >= share * self.floor else "misses floor"


BF16, FP32, AS_USED = "best torch bf16 SDPA", "best torch fp32 SDPA", "torch bf16 sdpa enable_gqa"
KERNELS: dict[int, tuple[Bar, ...]] = {
    1: (Bar(BF16, 6, 12), Bar(FP32, 4, 7)),
    4: (Bar(BF16, 2.0, 4.0), Bar(FP32, 3.0, 6.5), Bar(AS_USED, 14, 30)),
    8: (Bar(BF16, 1.8, 3.5), Bar(FP32, 2.8, 5.5), Bar(AS_USED, 22, 45)),
}
"""By query heads per KV head."""

IN_CACHE = {1: 9.5, 4: 22.0, 8: 38.0}
"""Target in microseconds per 1024 tokens and KV head, best time, data in cache."""

STEP_GROUP, STEP_TOKENS = 4, 4096
STEP = (Bar("exact", 6, 15), Bar("hqq-2", 10, 25))

TOKENS_LENGTH = 4096
DECODE_BAR = Bar("exact", 1.3, 1.8)
"""Decoding on a real model at `TOKENS_LENGTH`; elsewhere the interval has to reach `LEAST_DECODE`."""
LEAST_DECODE = 0.95
PREFILL_BAR, FLUSH_BAR = 1.15, 2.0
"""At most: reading a prompt relative to `DynamicCache`, a step that packs relative to one that does not."""


def per_head(row: Row, seconds: float) -> float:
    """Microseconds per 1024 tokens and KV head."""
    thousands = float(row.where["tokens"]) / 1024
    return seconds * 1e6 / (thousands * int(row.facts["heads"]))


def fastest(rows: Sequence[Row], **facts: str) -> Row | None:
    """The row with the least median among those with these facts; a fact may be given by how it begins."""
    fitting = [row for row in rows if all(str(row.facts.get(k, "")).startswith(v) for k, v in facts.items())]
    return min(fitting, key=lambda row: row.median, default=None)


def rival(name: str, rows: Sequence[Row]) -> Row | None:
    """The row that a bar is measured against."""
    if name in (BF16, FP32):
        return fastest(rows, role="torch", dtype="bf16" if name == BF16 else "fp32", formulation="sdpa")
    return next((row for row in rows if row.system == name), None)


def ours(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Presets that have bars, and their rows: default precision, out of cache."""
    for row in rows:
        preset = row.facts.get("preset")
        if preset in SHARE and row.facts["precision"] == "default" and not row.facts.get("in_cache"):
            yield preset, row


def kernel_sheet(rows: Sequence[Row]) -> Sheet:
    """Every bar of the kernels that these rows can be held against."""
    head = ("preset", "group", "tokens", "versus", "which is", "times faster [95 %]", "by best", *_LIMITS)
    sheet = Sheet("Floors and targets: head_dim 128, one thread", head, left=5)
    for cell in cells(rows):
        found = list(cell.values())
        where = found[0].where
        if any(where[k] != v for k, v in WHERE.items()) or where["tokens"] < SHORTEST:
            continue
        for bar in KERNELS.get(where["group"], ()):
            other = rival(bar.rival, found)
            for preset, row in ours(found) if other else ():
                assert other is not None
                ratio, share = times_faster(row, other), SHARE[preset]
                known = other.system.removeprefix("torch ")
                sheet.rows.append(
                    [
                        *(preset, str(where["group"]), context(where["tokens"]), bar.rival, known, spread(ratio)),
                        number(other.best / row.best),
                        *(number(share * bar.floor), number(share * bar.target), bar.verdict(ratio.value, share)),
                    ]
                )
    return sheet


def cache_sheet(rows: Sequence[Row]) -> Sheet:
    """Microseconds per 1024 tokens and KV head, in cache."""
    head = ("preset", "group", "tokens", "best", "median", "target", "verdict")
    sheet = Sheet("Microseconds per 1k tokens and KV head, in cache: head_dim 128, one thread", head, left=3)
    for row in rows:
        where, preset = row.where, str(row.facts.get("preset"))
        fits = row.facts.get("in_cache") and row.facts["precision"] == "default" and preset in SHARE
        if not fits or any(where[k] != v for k, v in WHERE.items()) or where["group"] not in IN_CACHE:
            continue
        if where["tokens"] < SHORTEST_IN_CACHE:
            continue
        best, target = per_head(row, row.best), IN_CACHE[where["group"]] / SHARE[preset]
        verdict = "meets target" if best <= target else "misses target"
        line = [preset, str(where["group"]), context(where["tokens"]), number(best)]
        sheet.rows.append([*line, number(per_head(row, row.median)), number(target), verdict])
    return sheet


def break_even(lengths: Sequence[tuple[int, Interval]]) -> str:
    """From how many tokens on a ratio is above 1, its interval too, at every measured length.

    Parameters
    ----------
    lengths : sequence of (tokens, ratio)
        Ascending.
    """
    start = None
    for tokens, ratio in lengths:
        above = (ratio.low if ratio.low == ratio.low else ratio.value) > 1
        start = (tokens if start is None else start) if above else None
    if start is None:
        return f"not up to {context(lengths[-1][0])}"
    return f"{context(start)} or less" if start == lengths[0][0] else context(start)
