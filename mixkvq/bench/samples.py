"""Random keys, values and queries that look like a model's: channels of unequal width and offset, drifting in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DRIFT = 128
"""Tokens of equal channel widths."""


@dataclass(frozen=True)
class Sampler:
    """Random states of one layer, the same for the same seed.

    Attributes
    ----------
    head_dim, heads : int
        Of keys and values.
    seed : int
    """

    head_dim: int
    heads: int = 8
    seed: int = 1

    def _channels(self, which: int, spread: float) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + which)
        return torch.exp(spread * torch.randn(1, self.heads, 1, self.head_dim, generator=generator))

    def states(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values, float32 [1, H, n, D]."""
        generator = torch.Generator().manual_seed(1000 * self.seed)
        shape, parts = (1, self.heads, tokens, self.head_dim), -(-tokens // _DRIFT)
        drift = torch.exp(0.2 * torch.randn(1, self.heads, parts, self.head_dim, generator=generator))
        width = 0.7 * self._channels(1, 0.6) * drift.repeat_interleave(_DRIFT, 2)[:, :, :tokens]
        k = torch.randn(shape, generator=generator) * width + self._channels(2, 0.5)
        return k, torch.randn(shape, generator=generator)

    def queries(self, group: int, tokens: int = 1) -> Tensor:
        """Queries of ``group`` heads per KV head, float32 [1, H * G, n, D]."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 17 + group)
        q = torch.randn(self.heads, group, tokens, self.head_dim, generator=generator)
        return (q * self._channels(3, 0.6)[0, :, None]).reshape(1, -1, tokens, self.head_dim)

    def importance(self) -> Tensor:
        """Root mean square of the queries, float32 [1, H, D]: what `queries.QueryStatistics` would find."""
        return self._channels(3, 0.6)[:, :, 0].contiguous()


def repeated(states: Tensor, tokens: int) -> Tensor:
    """The tokens of [1, H, n, D] over and over, in memory of their own, [1, H, tokens, D]."""
    times = -(-tokens // states.shape[2])
    return states.repeat(1, 1, times, 1)[:, :, :tokens].contiguous()
