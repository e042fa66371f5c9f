"""Tier choice under a budget of stored columns (docs/format.md section 4, *budget* and *layer*)."""

from __future__ import annotations

import numpy as np

from .layout import column_counts
from .numbers import F32, Array, Floats
from .tiers import TIER_BITS, Tiers


def hull(cost: Floats, usable: Array) -> list[tuple[int, np.float32]]:
    """The lower convex hull of a channel's (bits, cost).

    Parameters
    ----------
    cost : ndarray, float32, [5]
        Of the tier ids 0 ... 4.
    usable : ndarray, bool, [5]
        Tiers that can be coded.

    Returns
    -------
    list of (tier id, float32)
        The points, each with the quotient that leads to it; the first one's is infinite. Empty if no tier is left.
    """
    points: list[tuple[int, np.float32]] = []
    for tier in np.flatnonzero(usable & np.isfinite(cost)).tolist():
        if not points:
            points.append((tier, F32(np.inf)))
            continue
        if not cost[tier] < cost[points[-1][0]]:
            continue
        while True:
            last, led = points[-1]
            quotient = F32((cost[last] - cost[tier]) / F32(TIER_BITS[tier] - TIER_BITS[last]))
            if quotient < led or len(points) == 1:
                break
            points.pop()
        points.append((tier, quotient))
    return points


def choose_pooled(columns: int, costs: list[tuple[Floats, Array] | None]) -> list[Tiers | None]:
    """Tier ids of the heads that share a budget.

    Parameters
    ----------
    columns : int
        Budget per head that takes part.
    costs : list of (float32 [5, D], bool [5, D]) or None
        Of every head: cost of every tier and channel, and which can be coded; None for a head that takes no part.

    Returns
    -------
    list of (uint8 [D] or None)
        None: an exact record.
    """
    hulls: list[list[list[tuple[int, np.float32]]]] = []
    for pair in costs:
        points = [hull(*channel) for channel in zip(pair[0].T, pair[1].T, strict=True)] if pair else []
        hulls.append(points if all(points) else [])
    tiers = [[points[0][0] for points in head] for head in hulls]
    pool = columns * sum(len(head) > 0 for head in hulls)
    if sum(map(_stored_columns, tiers)) > pool:
        return [None] * len(costs)
    steps = [
        (-quotient, h, channel, tier)
        for h, head in enumerate(hulls)
        for channel, points in enumerate(head)
        for tier, quotient in points[1:]
    ]
    for _, h, channel, tier in sorted(steps):
        before = tiers[h][channel]
        tiers[h][channel] = tier
        if sum(map(_stored_columns, tiers)) > pool:
            tiers[h][channel] = before
            break
    return [np.array(head, np.uint8) if head else None for head in tiers]


def _stored_columns(tiers: list[int]) -> int:
    counts = tuple(tiers.count(tier) for tier in range(6))
    return sum(column_counts(counts))
