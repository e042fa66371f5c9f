"""Thresholds of `paper` for a number of bits: a pair of fixed ratio, scaled (arXiv 2512.19206, section 4).

Only the choice of tiers matters, so nothing is predicted: recorded first passes are replayed into caches, and the bits
are read from the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._core import inspect
from ..cache import MixKVQCache
from ..config import MixKVQConfig
from ..eval.replay import Prefill
from ..eval.tiers import records
from ..policy.patterns import TIER_BITS

PUBLISHED = (1.44, 0.79)
STEPS = 24
LOWEST, HIGHEST = 1e-3, 1e4


@dataclass(frozen=True)
class Scaled:
    """A pair of thresholds and the bits that it gives."""

    thresholds: tuple[float, float]
    code_bits: float
    """Mean bits of a key code, an exact channel counted as 16."""


def code_bits(model: Any, prefills: Sequence[Prefill], config: MixKVQConfig) -> float:
    """Mean bits of a key code over all records of the replayed texts, an exact channel counted as 16.

    Raises
    ------
    ValueError
        If the texts are too short for a record, or no layer is packed.
    """
    channels = np.zeros(len(TIER_BITS))
    for prefill in prefills:
        cache = MixKVQCache(config, config=model.config)
        prefill.replay(cache)
        for layer in cache.layers:
            for _, record in records(layer):
                channels += inspect(record)["channels"]
    if not channels.sum():
        raise ValueError("nothing was packed: the texts are too short, or no layer of the model is packed")
    return float(channels @ np.array(TIER_BITS) / channels.sum())


def scale_thresholds(
    model: Any,
    prefills: Sequence[Prefill],
    config: MixKVQConfig,
    target: float,
    ratio: float = PUBLISHED[0] / PUBLISHED[1],
) -> Scaled:
    """The smallest pair (ratio * low, low) with at most ``target`` bits per key code, by bisection.

    Parameters
    ----------
    model : causal language model
    prefills : sequence of Prefill
        Of calibration texts.
    config : MixKVQConfig
        With ``allocate="threshold"``.
    target : float
        2 to 16; 2 gives the lowest tier to all channels.
    ratio : float
        High over low, at least 1.

    Raises
    ------
    ValueError
        For a target or ratio out of range, or when no pair reaches the target.
    """
    if not 2 <= target < 16:
        raise ValueError(f"target is {target}, must be from 2 to below 16 bits per key code")
    if ratio < 1:
        raise ValueError(f"ratio is {ratio}, must be at least 1")

    def bits(low: float) -> float:
        return code_bits(model, prefills, config.replace(thresholds=(ratio * low, low)))

    below, above = LOWEST, HIGHEST  # bits(below) > target >= bits(above)
    reached = bits(above)
    if reached > target:
        raise ValueError(f"target is {target}, and thresholds of {above:g} still give {reached:.3f} bits")
    for _ in range(STEPS):
        middle = float(np.sqrt(below * above))
        found = bits(middle)
        if found > target:
            below = middle
        else:
            above, reached = middle, found
        if above / below < 1.001:
            break
    return Scaled((ratio * above, above), reached)
