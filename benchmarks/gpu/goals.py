"""What is promised (floor) and aimed at (target) on a GPU, and what a result reaches."""

from __future__ import annotations

from dataclasses import dataclass

GIGABYTE = 1_000_000_000
LONG = 32768
"""Tokens from which on the goals of the kernels hold, with at least a `GIGABYTE` of records."""


@dataclass(frozen=True)
class Goal:
    """A number that has to reach ``floor`` and is meant to reach ``target``; the other way round if ``at_most``."""

    name: str
    floor: float
    target: float | None = None
    stretch: float | None = None
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        """What a value reaches."""
        if value is None:
            return "not measured"
        steps = (("stretch", self.stretch), ("target", self.target), ("floor", self.floor))
        for name, bar in steps:
            if bar is not None and (value <= bar if self.at_most else value >= bar):
                return f"meets {name}"
        return "misses floor"

    @property
    def text(self) -> str:
        """Floor and further goals, for people."""
        sign = "<=" if self.at_most else ">="
        more = [f"{name} {bar:g}" for name, bar in (("target", self.target), ("stretch", self.stretch)) if bar]
        return ", ".join([f"{sign} {self.floor:g}", *more])


COPY_SHARE = Goal("packed bytes over time, share of the copy rate", 0.50, 0.65, 0.80)
SDPA_RATIO = Goal("times as fast as the best bf16 SDPA", 2.5, 3.8)
TOKENS_RATIO = Goal("tokens/s over those of DynamicCache", 1.5)
MEMORY_RATIO = Goal("KV bytes over those of DynamicCache", 0.3, at_most=True)
PREFILL_RATIO = Goal("peak memory of prefill over that of DynamicCache", 1.0, at_most=True)
FINDINGS = Goal("findings of compute-sanitizer", 0, at_most=True)


def kernels_count(tokens: float, nbytes: float) -> bool:
    """Whether the goals of the kernels hold at this size."""
    return tokens >= LONG and nbytes >= GIGABYTE
