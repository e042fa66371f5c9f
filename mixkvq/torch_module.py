"""`mixkvq._torch` beside `mixkvq._core`: loads it where it was built, and makes torch's pool run the core's loops.

Everything eager works without `mixkvq._torch`; compiled graphs need its operators, whose shapes are stated here.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _core
from .arrays import codec_of_numbers
from .origin import reinstall_line


def _load() -> str | None:
    """Import `mixkvq._torch`, which makes torch's pool the executor. Returns why that failed, or None."""
    try:
        import_module("mixkvq._torch")
    except ModuleNotFoundError:
        return "it was not built: mixkvq was installed before torch, or with MIXKVQ_TORCH=off"
    except ImportError as error:
        return str(error)
    return None


def _install_pool() -> bool:
    """Give the core the address of torch's parallel loop. False if this libtorch does not export it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return False
    _core.set_executor_address(address or 0)
    return bool(address)


PROBLEM: str | None = _load()
"""Why `mixkvq._torch` cannot be used, or None."""

_REINSTALL = reinstall_line()  # made here: what raises in a traced function must not call anything

PARALLEL: bool = PROBLEM is None or _install_pool()
"""Whether the core's loops run in torch's intra-op pool; else in the calling thread."""


def compiling() -> bool:
    """Whether torch is tracing a graph, which takes the operators. Raises RuntimeError where there are none."""
    if not is_compiling():
        return False
    if PROBLEM is not None:
        raise RuntimeError(
            f"torch.compile needs mixkvq._torch, and {PROBLEM}. Build it beside the installed torch: {_REINSTALL}"
        )
    return True


# ---- shapes for compiled graphs ------------------------------------------------------------------------------------
def _fake_attend(q: Tensor, *args: object) -> Tensor:
    batch, heads, n, dim = q.shape
    return q.new_empty((batch, n, heads, dim))


def _fake_pack(
    k: Tensor,
    v: Tensor,
    fields: list[int],
    thresholds: list[float],
    first: Tensor,
    blocks: Tensor,
    max_blocks: int,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    slots = (k.shape[0], k.shape[1], max_blocks)
    staging = k.new_empty((*slots, codec_of_numbers(fields, thresholds).record_bound), dtype=torch.uint8)
    return staging, k.new_empty(slots, dtype=torch.int64), k.new_empty(slots, dtype=torch.int64)


def _fake_in_place(*args: object) -> None:
    return None


if PROBLEM is None:
    for _name, _fake in (
        ("attend", _fake_attend),
        ("pack", _fake_pack),
        ("unpack", _fake_in_place),
        ("append_", _fake_in_place),
        ("salience_", _fake_in_place),
    ):
        torch.library.register_fake(f"mixkvq::{_name}", _fake)
