"""Patterns: how many channels of a head get how many bits, scaled to any head_dim.

A preset states its menu for 64 channels in whole u32 columns (docs/format.md section 3.2). For another head_dim the
nearest split that fills its share of columns is searched, so that all patterns of a menu keep one record size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def full_menu(columns: int) -> tuple[dict[int, int], ...]:
    """Every pattern ``{bits: channels}`` of 64 channels that fills this many u32 columns to the last bit.

    With c8, c4, c2 and c1 columns of a kind there are 4 c8 channels of 8 bits and 8 c4 of 4; a 3-bit channel takes an
    entry of a two-bit and one of a one-bit column, so that their number follows from the 64.
    """
    menu = []
    for c8 in range(columns + 1):
        for c4 in range(columns + 1 - c8):
            for c2 in range(columns + 1 - c8 - c4):
                c1 = columns - c8 - c4 - c2
                n8, n4 = 4 * c8, 8 * c4
                n3 = n8 + n4 + 16 * c2 + 32 * c1 - 64
                split = {8: n8, 4: n4, 3: n3, 2: 16 * c2 - n3, 1: 32 * c1 - n3}
                if min(split.values()) >= 0:
                    menu.append({bits: n for bits, n in split.items() if n})
    return tuple(menu)


def scale_menu(menu: Sequence[Mapping[int, int]], head_dim: int) -> tuple[tuple[int, ...], ...]:
    """Patterns ``{bits: channels}`` for 64 channels as channels per tier id for ``head_dim`` channels.

    Patterns of a menu that fill as many columns as each other still do so (`scale_counts`): one record size. A menu of
    one pattern with one tier gives that tier to all channels, whatever columns that needs.
    """
    if len(menu) == 1 and len(menu[0]) == 1:
        return (tuple(head_dim if bits in menu[0] else 0 for bits in TIER_BITS),)
    return tuple(scale_counts(counts_of(pattern), head_dim) for pattern in menu)


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
        share (rounded up to a column), the one with the smallest sum of absolute differences of channels, plus that of
        the code bits; ties take more channels in the upper tiers. Where the plain multiple has that number of columns
        it is this split.
    """
    plain = tuple(n * head_dim // 64 for n in counts)
    if head_dim % 64 == 0 and column_count(plain) == column_count(counts) * head_dim // 64:
        return plain
    split = _nearest(counts, head_dim, (4, 1, 4, 8, 4)) or _nearest(counts, head_dim, (1, 1, 1, 1, 1))
    assert split is not None  # steps of one channel always add up
    return split


def _nearest(counts: tuple[int, ...], head_dim: int, steps: tuple[int, ...]) -> tuple[int, ...] | None:
    """`scale_counts` among the splits in whole ``steps`` per tier id; None where these do not add up."""
    want = [n * head_dim / 64 for n in counts]
    target = -(-column_count(counts) * head_dim // 64)
    best: tuple[float, float, tuple[int, ...]] | None = None
    exact = round(want[5])
    two_bits = counts[1] > 0 or counts[2] == 64  # all at 3 bits waste half a one-bit column: a few channels give way

    def near(tier: int, most: int) -> range:
        """Channels to try for a tier: whole steps around its share."""
        if not counts[tier]:
            return range(1)
        step = steps[tier]
        return range(max(0, int(want[tier]) // step * step - 16), min(most, int(want[tier]) + 16) + 1, step)

    for n8 in near(4, head_dim - exact):
        for n4 in near(3, head_dim - exact - n8):
            for n3 in near(2, head_dim - exact - n8 - n4):
                left = head_dim - exact - n8 - n4 - n3
                for n1 in near(0, left) if two_bits else (left if counts[0] else 0,):
                    split = (n1, left - n1, n3, n4, n8, exact)
                    if split[1] and not two_bits:
                        continue
                    away = [a - b for a, b in zip(split, want, strict=True)]
                    bits = sum(n * width for n, width in zip(away, TIER_BITS, strict=True))
                    key = (
                        abs(column_count(split) - target),
                        sum(map(abs, away)) + abs(bits),
                        tuple(-n for n in reversed(split)),
                    )
                    if best is None or key < best:
                        best = key
    return tuple(-n for n in reversed(best[2])) if best else None
