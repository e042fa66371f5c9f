"""Keeping the tensors of a cache out of autograd and of inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients and with ordinary tensors: those of inference mode cannot be changed outside of it."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped
