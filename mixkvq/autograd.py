"""Keeping the tensors of a cache out of autograd and of inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

P = ParamSpec("P")
R = TypeVar("R")


def outside_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients and with ordinary tensors: those of inference mode cannot be changed outside of it."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether a derivative by any of them is being computed, backward or forward."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return in_dual_level() and any(map(_has_tangent, tensors))


def in_dual_level() -> bool:
    """Whether derivatives are computed forward."""
    level: int = forward_ad._current_level
    return level >= 0


def _has_tangent(tensor: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


class OrdinaryCopies:
    """Its tensors are ordinary ones in a copy or after unpickling too, even if that is done in inference mode."""

    @outside_autograd
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, state))
