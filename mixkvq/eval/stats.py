"""Intervals of means and of paired ratios, by bootstrap over stretches of text.

Neighbouring positions are not independent, so what is resampled are stretches of `STRETCH` positions, the same ones for
both schemes of a ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRETCH = 64
RESAMPLES = 9999
MEDIAN_RESAMPLES = 1999
_SEED = 20251219

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def stretches(values: list[Doubles]) -> Doubles:
    """Means over stretches of `STRETCH` positions; every array is cut on its own, a shorter rest counts as one."""
    return np.array([part.mean() for x in values for part in np.split(x, range(STRETCH, len(x), STRETCH))])


def _bootstrap(samples: tuple[Doubles, ...], statistic: Any, resamples: int | None = None) -> Interval:
    from scipy.stats import bootstrap

    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:
        return Interval(value, float("nan"), float("nan"))
    found = bootstrap(
        samples,
        statistic,
        paired=True,
        n_resamples=RESAMPLES if resamples is None else resamples,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def mean_interval(x: Doubles) -> Interval:
    """Mean of independent units with its 95 % interval (NaN bounds for a single unit)."""
    return _bootstrap((x,), lambda a, axis: a.mean(axis))


def median_interval(x: Doubles) -> Interval:
    """Median of independent units with its 95 % interval (NaN bounds for a single unit)."""
    return _bootstrap((x,), lambda a, axis: np.median(a, axis), MEDIAN_RESAMPLES)


def excess_ratio_interval(x: Doubles, y: Doubles, base: Doubles) -> Interval:
    """(median(x) - median(base)) / (median(y) - median(base)) of paired units with its 95 % interval."""

    def statistic(a: Doubles, b: Doubles, c: Doubles, axis: int) -> Doubles:
        middle = np.median(c, axis)
        return np.asarray((np.median(a, axis) - middle) / (np.median(b, axis) - middle))

    return _bootstrap((x, y, base), statistic, MEDIAN_RESAMPLES)


def ratio_interval(x: Doubles, y: Doubles) -> Interval:
    """mean(x) / mean(y) of paired units with its 95 % interval.

    Raises
    ------
    ValueError
        If the two are not paired.
    """
    if x.shape != y.shape:
        raise ValueError(f"x has {x.size} units and y {y.size}, must be as many")
    return _bootstrap((x, y), lambda a, b, axis: a.mean(axis) / b.mean(axis))


def difference_interval(x: Doubles, y: Doubles) -> Interval:
    """mean(x - y) of paired units with its 95 % interval."""
    if x.shape != y.shape:
        raise ValueError(f"x has {x.size} units and y {y.size}, must be as many")
    return _bootstrap((x - y,), lambda a, axis: a.mean(axis))
