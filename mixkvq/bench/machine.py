"""The machine under a benchmark: its last-level cache, and how fast it reads memory."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from .turns import CLOCKS

PASSES = 5
"""Data count as out of cache when this many times the last-level cache pass between two uses."""

_READ_BYTES = 512 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 0 where the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text or 0))
    if max(sizes) == 0:
        names = ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
        sizes += [os.sysconf(name) for name in names if name in os.sysconf_names]
    return max(sizes)


def read_rate(threads: int, clock: str = "wall", nbytes: int = _READ_BYTES) -> float:
    """Bytes per second at which torch reads memory: the fastest of several sums and maxima of a large tensor."""
    now = CLOCKS[clock]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block, best = torch.zeros(nbytes // 4), 0.0
        for reduce in (torch.sum, torch.amax):
            for _ in range(5):
                begin = now()
                reduce(block)
                best = max(best, nbytes / (now() - begin))
        return best
    finally:
        torch.set_num_threads(before)


def measure(threads: tuple[int, ...], clock: str) -> dict[str, Any]:
    """What a log says about the machine."""
    return {
        "last level cache": last_level_cache(),
        "read rate": {str(n): read_rate(n, clock) for n in threads},
        "load average": os.getloadavg()[0],
        "clock": clock,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def copies_to_pass(nbytes: int, cache: int, memory: int) -> int:
    """How many copies to read in turn so that `PASSES` caches pass before one is read again, within ``memory``."""
    if nbytes <= 0:
        raise ValueError(f"nbytes is {nbytes}, must be positive")
    return max(1, min(-(-PASSES * cache // nbytes), memory // nbytes))


def resident(passed: int, cache: int) -> bool:
    """Whether data may still be in the cache when ``passed`` bytes were read since they were used last."""
    return passed < PASSES * cache


class Evictor:
    """Reads other memory, `PASSES` times the last-level cache."""

    def __init__(self, cache: int) -> None:
        self._block = torch.zeros(max(PASSES * cache // 4, 1))

    def __call__(self) -> None:
        """Put everything else out of the cache."""
        self._block.sum()
