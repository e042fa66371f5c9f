"""`no_host_reads`: stops a test where something reads a tensor's numbers, which on a GPU would wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")
METHODS = ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
MAKERS = ("tensor", "as_tensor", "from_numpy")


class Watch(TorchDispatchMode):
    """Counts allocations; raises for operators whose result is on the host, or whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in READS or any(tag == torch.Tag.data_dependent_output for tag in func.tags):
            raise AssertionError(f"{name} reads a tensor")
        self.calls.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Inside, tensors give no numbers and are not made of any: both are copies between host and device."""

    def refuse(name: str) -> Any:
        def refused(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"{name} is a copy between host and device")

        return refused

    with monkeypatch.context() as patch, Watch() as watch:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, refuse(name))
        for name in MAKERS:
            patch.setattr(torch, name, refuse(name))
        yield watch
