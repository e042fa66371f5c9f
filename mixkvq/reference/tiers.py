"""Tier choice: how many bits every key channel of a block gets (docs/format.md section 4, "Tier choice")."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .codec import Codec
from .coding import code_groups
from .numbers import F32, Array, Floats, eight_sum

TIER_BITS = (1, 2, 3, 4, 8, 0)
"""Bits of the tier ids 0 ... 5; 0 stands for exact."""
TIER_EXACT = 5
MODEL_COST = (0.56, 0.125, 0.031, 0.0082, 0.0003)
"""Expected error of the tier ids 0 ... 4, as a share of the variance."""

Tiers = NDArray[np.uint8]


def choose_tiers(codec: Codec, x: Floats, importance: Floats) -> Tiers | None:
    """Tier id of every channel, by thresholds or patterns.

    Parameters
    ----------
    codec : Codec
    x : ndarray, float32, [T, D]
        Keys as they will be coded: relative to the reference, if any.
    importance : ndarray, float32, [D]

    Returns
    -------
    ndarray, uint8, [D], or None
        None if no pattern can code the block.
    """
    with np.errstate(all="ignore"):
        score = importance * ((x.max(axis=0) - x.min(axis=0)) / F32(3))
        if codec.allocate == "threshold":
            high, low = F32(codec.threshold_high), F32(codec.threshold_low)
            return np.where(score > high, 5, np.where(score > low, 3, 1)).astype(np.uint8)
        candidates = [assign(score, counts) for counts in codec.patterns]
        if len(candidates) == 1:
            return candidates[0]
        costs, fits = tier_costs(codec, x, importance)
        best: tuple[np.float32, Tiers] | None = None
        for tiers in candidates:
            cost = F32(0)
            possible = True
            for channel, tier in enumerate(tiers):
                if tier != TIER_EXACT:
                    cost = F32(cost + costs[tier, channel])
                    possible &= bool(fits[tier, channel])
            if possible and (best is None or cost < best[0]):
                best = cost, tiers
        return best[1] if best else None


def tier_costs(codec: Codec, x: Floats, importance: Floats) -> tuple[Floats, Array]:
    """Expected logit error of the tier ids 0 ... 4 and every channel, float32 [5, D], and where that fits, bool."""
    with np.errstate(all="ignore"):
        errors, fits = model_errors(x) if codec.pattern_cost == "model" else measured_errors(codec, x)
        return np.asarray((importance * importance) * errors, F32), fits


def assign(score: Floats, counts: tuple[int, ...]) -> Tiers:
    """Channels by descending score take the tiers exact, 8, 4, 3, 2, 1; ties: lower index first; 0 * inf before all."""
    tiers = np.empty(len(score), np.uint8)
    order = np.lexsort((-score, ~np.isnan(score)))
    tiers[order] = np.repeat(np.arange(5, -1, -1), counts[::-1])
    return tiers


def model_errors(x: Floats) -> tuple[Floats, Array]:
    """Expected error per tier id 0 ... 4 and channel, [5, D], from the variance; and that all of them fit."""
    count = F32(len(x))
    away = x - eight_sum(x) / count
    variance = eight_sum(away * away) / count
    errors = np.asarray(variance * np.array(MODEL_COST, F32)[:, None], F32)
    return errors, np.ones(errors.shape, bool)


def measured_errors(codec: Codec, x: Floats) -> tuple[Floats, Array]:
    """Squared error per token, by coding every channel with every width, [5, D]; and where all groups fit."""
    tokens, dim = x.shape
    groups = x.reshape(-1, codec.key_group, dim).swapaxes(0, 1)
    errors, fits = np.zeros((5, dim), F32), np.ones((5, dim), bool)
    for tier in range(5):
        coded = code_groups(groups, TIER_BITS[tier], codec.key_range, codec.key_metadata)
        for error in coded.error:
            errors[tier] = errors[tier] + error
        errors[tier] = errors[tier] / F32(tokens)
        fits[tier] = coded.fits.all(axis=0)
    return errors, fits
