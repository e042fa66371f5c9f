"""`Placement`: where the layers of a cache keep what kernels on CUDA devices need besides the layers' own tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import torch_module

_KEPT = 8  # workspaces, for as many shapes of calls and devices; the oldest goes


class Workspaces:
    """Scratch memory of attention, for layers that run one after the other: zeros at first, left so by every call."""

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspaces], tuple[()]]:
        return Workspaces, ()  # a copy may run at the same time

    def take(self, like: Any, nbytes: int, device: torch.device) -> Tensor:
        """At least so many bytes, for calls that have ``like`` in common: others would find no zeros."""
        key = device, like
        found = self._held.get(key)
        if found is None or found.numel() < nbytes:
            if found is None and len(self._held) >= _KEPT:
                del self._held[next(iter(self._held))]
            with torch.inference_mode(False):
                found = self._held[key] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return found

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        return list(self._held.values())


@dataclass
class Placement:
    """Where the layers of one cache keep what kernels on CUDA devices need.

    Attributes
    ----------
    offload : bool
        Records in pinned host memory, which the kernels read over the bus.
    workspaces : Workspaces
    """

    offload: bool = False
    workspaces: Workspaces = field(default_factory=Workspaces)


def placed(offload: Any) -> Placement:
    """The placement of a new cache.

    Raises
    ------
    TypeError, ValueError
        If ``offload`` is no bool, or True where no CUDA device is.
    """
    if not isinstance(offload, bool):
        raise TypeError(f"offload is {offload!r}, must be True or False")
    if offload and torch_module.CUDA_PROBLEM is not None:
        problem, remedy = torch_module.CUDA_PROBLEM, torch_module.CUDA_REMEDY
        raise ValueError(f"offload is True, must be False without kernels that read host memory: {problem}; {remedy}")
    if offload and not torch.cuda.is_available():
        raise ValueError("offload is True, must be False where there is no CUDA device: on the CPU nothing is gained")
    return Placement(offload)
