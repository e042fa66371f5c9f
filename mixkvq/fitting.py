"""How many rows, or tokens per row, a given memory has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .estimates import Estimate, estimate

_ENDLESS = 1 << 40


def largest_batch(config: Any, memory: int, *, tokens: int, **options: Any) -> int:
    """The most rows whose cache fits into this many bytes, also at its peak; 0 if not even one does.

    Where records depend on what is read and were not measured, the most that they can take must fit.

    Parameters
    ----------
    config, tokens, **options
        As in `estimate`.
    memory : int
        Bytes.
    """
    return _largest(memory, lambda batch: estimate(config, tokens=tokens, batch=batch, **options))


def largest_tokens(config: Any, memory: int, *, batch: int = 1, **options: Any) -> int:
    """The most tokens per row whose cache fits into this many bytes, as `largest_batch`; 0 if not even one does."""
    return _largest(memory, lambda tokens: estimate(config, tokens=tokens, batch=batch, **options))


def _largest(memory: int, make: Callable[[int], Estimate]) -> int:
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory is {memory!r}, must be a number of bytes")
    if memory < 0:
        raise ValueError(f"memory is {memory}, must be at least 0 bytes")

    def fits(count: int) -> bool:
        peak = make(count).peak
        return (peak.most if peak.expected is None else peak.expected) <= memory

    low, high = 0, 1  # low fits
    while fits(high):
        if high >= _ENDLESS:
            raise ValueError(f"memory is {memory} bytes, which {high} of them do not fill: this cache does not grow")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
