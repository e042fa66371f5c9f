"""Attention of one decode step on unpacked keys and values: every way that torch offers, and the core's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .. import ops

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, Q, 1, D], k and v [1, H, N, D] -> [1, Q, 1, D]."""

AS_USED = "sdpa enable_gqa"
"""How transformers calls it for grouped queries."""


def _as_used(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, enable_gqa=q.shape[1] > k.shape[1])


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """The query heads of a KV head as rows, [1, H, G, D]."""
    return q.view(1, k.shape[1], -1, q.shape[3])


def _rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(_grouped(q, k), k, v).view(q.shape)


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(_grouped(q, k) * q.shape[3] ** -0.5, k.transpose(2, 3))
    return torch.matmul(scores.softmax(-1), v).view(q.shape)


def formulations(group: int) -> dict[str, Attention]:
    """Ways to compute it with torch, by name."""
    if group == 1:  # there is nothing to group
        return {"sdpa": _as_used, "matmul": _matmul}
    return {AS_USED: _as_used, "sdpa rows": _rows, "matmul": _matmul}


def window(k: Tensor, v: Tensor) -> ops.Handle:
    """The core's attention over plain keys and values [1, H, N, D]: a layer whose tokens are all in the window."""
    _, heads, tokens, _ = k.shape
    none = torch.zeros(1, dtype=torch.int64)
    return ops.layer(k, v, torch.tensor([tokens]), None, 0, [], none.new_zeros(1, heads, 0), none)
