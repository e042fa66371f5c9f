"""What the queries of a layer look like, channel by channel: the importance I_d of docs/format.md section 4."""

from __future__ import annotations

import torch

from . import ops
from .autograd import OrdinaryCopies, outside_autograd
from .sending import SentAsCopy

_POWER = {"mean_abs": 1, "rms": 2}


class QueryStatistics(OrdinaryCopies, SentAsCopy):
    """Sums of |q_d|^p per batch row, KV head and channel, over all query positions and the query heads of the KV head.

    Parameters
    ----------
    salience : {"rms", "mean_abs", "none"}
        Which mean `importance` returns; "none" collects nothing.

    Attributes
    ----------
    sum : float64 tensor [B, H, D] or None
        Allocated when the shape is known.
    whole : int
        Head-tokens of calls without padding, the same for every row.
    """

    def __init__(self, salience: str) -> None:
        self.power = _POWER.get(salience, 0)
        self.sum: torch.Tensor | None = None
        self._partial: torch.Tensor | None = None  # int64 [B]: head-tokens of calls with padding
        self.whole = 0

    @property
    def count(self) -> torch.Tensor | None:
        """Head-tokens in the sum, int64 [B]; None before it is allocated."""
        return None if self._partial is None else self._partial + self.whole

    @classmethod
    def restored(
        cls, salience: str, sum: torch.Tensor | None, partial: torch.Tensor | None, whole: int
    ) -> QueryStatistics:
        """Statistics as they were; see `parts`."""
        self = cls(salience)
        self.sum, self._partial, self.whole = sum, partial, whole
        return self

    @property
    def parts(self) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """All that there is: sum, head-tokens of calls with padding (int64 [B]), head-tokens of calls without."""
        return self.sum, self._partial, self.whole

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""
        return [t for t in (self.sum, self._partial) if t is not None]

    @property
    def sums(self) -> tuple[torch.Tensor, int] | None:
        """Sum and power, as `ops.layer` takes them."""
        return None if self.sum is None else (self.sum, self.power)

    def allocate(self, batch: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        """Make room for sums, unless there is or none is wanted."""
        if self.power and self.sum is None:
            with torch.inference_mode(False):
                sum = torch.zeros(batch, kv_heads, head_dim, dtype=torch.float64, device=device)
                self._partial, self.sum = torch.zeros(batch, dtype=torch.int64, device=device), sum

    def add(self, q: torch.Tensor, kv_heads: int, first: torch.Tensor | None) -> None:
        """Add the queries of one call.

        Parameters
        ----------
        q : tensor [B, Q, n, D]
        kv_heads : int
            H, a divisor of Q.
        first : int64 tensor [B] or None
            First query of each row that is not padding, 0 to n; None: all are real.
        """
        batch, heads, n, head_dim = q.shape
        self.allocate(batch, kv_heads, head_dim, q.device)
        if self.sum is None or self._partial is None:
            return
        group = heads // kv_heads
        if first is None:
            whole, partial = self.whole + n * group, self._partial
        else:
            whole, partial = self.whole, self._partial + (n - first) * group
        ops.salience_(self.sum, q, kv_heads, self.power, first)
        self.whole, self._partial = whole, partial

    def importance(self) -> torch.Tensor | None:
        """I_d as float32 [B, H, D], 1 where no query or one that is not finite was seen; None before any query."""
        count = self.count
        if self.sum is None or count is None or not (self.whole or bool(count.any())):
            return None
        mean = self.sum / count.view(-1, 1, 1)  # nan without queries
        value = (mean.sqrt() if self.power == 2 else mean).float()
        return torch.where(value.isfinite(), value, 1.0).contiguous()

    def move(self, device: torch.device) -> None:
        """To another device."""
        if self.sum is not None and self._partial is not None:
            self.sum, self._partial = self.sum.to(device), self._partial.to(device)

    @outside_autograd
    def gather(self, rows: torch.Tensor) -> None:
        """Keep these batch rows, in this order."""
        if self.sum is not None and self._partial is not None:
            self.sum, self._partial = self.sum.index_select(0, rows), self._partial.index_select(0, rows)
