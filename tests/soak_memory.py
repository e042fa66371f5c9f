"""What a long run holds: resident memory with the slope of a line through it, and live objects by class."""

from __future__ import annotations

import ctypes
import gc
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, linear_regression

import torch

from mixkvq import MixKVQCache, _core
from mixkvq.handle import PackedHandle
from mixkvq.layer import MixKVQLayer

SPANS, T95 = 12, 2.228
"""Groups of measurements, and Student's t for 95 %, two-sided, with SPANS - 2 degrees of freedom."""
_LIBC = ctypes.CDLL(None)


def resident() -> int:
    """Bytes of this process in memory, once all that is free was given back."""
    gc.collect()
    _LIBC.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def census() -> Counter[str]:
    """Objects that are alive: tensors, and what a cache is made of."""
    gc.collect()
    kinds = {"caches": MixKVQCache, "layers": MixKVQLayer, "core layers": _core.Layer, "handles": PackedHandle}
    found: Counter[str] = Counter({"tensors": 0, **dict.fromkeys(kinds, 0)})
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance asks some objects for their __class__, which may compute
        if issubclass(kind, torch.Tensor):
            found["tensors"] += 1
        for name, wanted in kinds.items():
            found[name] += issubclass(kind, wanted)
    return found


@dataclass(frozen=True)
class Slope:
    """Of a line through measurements.

    Attributes
    ----------
    rate : float
        Per unit of time.
    margin : float
        Half of its 95 % confidence interval.
    """

    rate: float
    margin: float

    @property
    def least(self) -> float:
        """What the rate is at least, with 97.5 % confidence."""
        return self.rate - self.margin


def slope(times: Sequence[float], values: Sequence[float]) -> Slope:
    """Least squares through the means of `SPANS` groups of measurements that follow each other.

    Measurements beside each other are alike (the allocator keeps what it got), and a fit through all of them would
    believe itself far too exact. Means of groups are nearly independent.

    Raises
    ------
    ValueError
        If there are fewer measurements than groups.
    """
    if len(times) < SPANS:
        raise ValueError(f"{len(times)} measurements, must be {SPANS} at least: run for longer")
    cuts = [len(times) * group // SPANS for group in range(SPANS + 1)]
    x, y = ([fmean(each[a:b]) for a, b in pairwise(cuts)] for each in (times, values))
    fit = linear_regression(x, y)
    rest = sum((value - fit.intercept - fit.slope * at) ** 2 for at, value in zip(x, y, strict=True))
    spread = sum((at - fmean(x)) ** 2 for at in x)
    return Slope(fit.slope, T95 * math.sqrt(rest / (SPANS - 2) / spread))
