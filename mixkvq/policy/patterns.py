"""Patterns: how many channels of a head get how many bits, scaled to any head_dim.

A preset states its menu for 64 channels in whole u32 columns (docs/format.md section 3.2). Multiples of 64 scale
exactly; for the others the nearest split with as many columns is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

TIER_BITS = (1, 2, 3, 4, 8, 16)
"""Bits of the tier ids 0 ... 5; 16 stands for the exact tier, whatever the model's dtype."""


def column_count(counts: tuple[int, ...]) -> int:
    """u32 columns per token that hold ``counts`` channels per tier (tier-id order; exact channels need none)."""
    n1, n2, n3, n4, n8, _ = counts
    return -(-n8 // 4) - (-n4 // 8) - (-(n3 + n2) // 16) - (-(n3 + n1) // 32)


def counts_of(pattern: Mapping[int, int]) -> tuple[int, ...]:
    """``{bits: channels}`` as channels per tier id."""
    return tuple(pattern.get(bits, 0) for bits in TIER_BITS)


@cache
def scale_counts(counts: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    """The split of ``head_dim`` channels nearest to ``counts`` (which splits 64).

    Parameters
    ----------
    counts : tuple of int
        Channels per tier id of a pattern for 64 channels.
    head_dim : int
        Channels to split, a positive multiple of 8.

    Returns
    -------
    tuple of int
        Channels per tier id, summing to ``head_dim``: of the splits whose number of columns is nearest to the pattern's
        share (rounded up to a column), the one with the smallest sum of absolute differences; ties take more
        channels in the upper tiers.
    """
    if head_dim % 64 == 0:
        return tuple(n * head_dim // 64 for n in counts)
    want = [n * head_dim / 64 for n in counts]
    used = [tier for tier, n in enumerate(counts) if n]
    if len(used) == 1:
        return tuple(head_dim if tier == used[0] else 0 for tier in range(6))
    target = -(-column_count(counts) * head_dim // 64)
    best: tuple[float, float, tuple[int, ...]] | None = None
    exact = round(want[5]) if counts[5] else 0
    rest = head_dim - exact
    for n8 in range(0, rest + 1, 4) if counts[4] else (0,):
        for n4 in range(0, rest - n8 + 1, 8) if counts[3] else (0,):
            for n3 in range(0, rest - n8 - n4 + 1, 4) if counts[2] else (0,):
                left = rest - n8 - n4 - n3
                for n1 in range(0, left + 1, 4) if counts[0] else (0,):
                    split = (n1, left - n1, n3, n4, n8, exact)
                    if split[1] and not counts[1]:
                        continue
                    columns = column_count(split)
                    distance = sum(abs(a - b) for a, b in zip(split, want, strict=True))
                    key = (abs(columns - target), distance, tuple(-n for n in reversed(split)))
                    if best is None or key < best:
                        best = key
    if best is None:  # e.g. eight channels and a menu without 2 bits: the lowest tier takes all
        return tuple(head_dim if tier == used[0] else 0 for tier in range(6))
    return tuple(-n for n in reversed(best[2]))
