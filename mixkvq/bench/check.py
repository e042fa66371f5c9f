"""Results are checked against float64 attention before anything is timed."""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {"exact": 1e-5, "default": 2e-3, "fast": 6e-2}
"""Relative L2 error that each precision of our attention promises."""

PLAIN_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""The same for rivals on plain keys and values. Formulations that round scores to bfloat16 shift a score of 20, hence
the logarithm of its weight, by up to 20 * 2^-9."""


class WrongResult(RuntimeError):
    """A result that is too far from float64 attention."""


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 attention of q [1, Q, 1, D] over k, v [1, H, N, D], any dtype: float64 [1, Q, 1, D]."""
    heads = k.shape[1]
    grouped = q.view(heads, -1, q.shape[3]).double()
    parts = []
    for h in range(heads):  # head by head: a long history in float64 is large
        scores = grouped[h] @ k[0, h].double().T * q.shape[3] ** -0.5
        parts.append(scores.softmax(-1) @ v[0, h].double())
    return torch.cat(parts).view(q.shape)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error of the worst query head of [1, Q, 1, D]."""
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    return float(error.max())


def check(name: str, got: Tensor, want: Tensor, bound: float) -> float:
    """The relative error.

    Raises
    ------
    WrongResult
        If it is above the bound, or not a number.
    """
    error = relative_error(got.reshape(want.shape), want)
    if not error <= bound:
        raise WrongResult(f"{name}: relative error {error:.3g} against float64 attention, must be at most {bound:.3g}")
    return error
