"""`mixkvq._torch` and `mixkvq._cuda` beside `mixkvq._core`: loads what was built, and makes torch's pool run the core's
loops.

Everything eager on the CPU works without them; compiled graphs and CUDA tensors need the operators of `mixkvq._torch`,
whose shapes are stated here, and CUDA tensors the kernels of `mixkvq._cuda`.
"""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

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


def _stream_function() -> int:
    """Address of libtorch_cuda's function that tells the current stream, which torch before 2.13 has no other for."""
    try:
        library = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(library.aoti_torch_get_current_cuda_stream, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _load_cuda() -> tuple[str | None, str]:
    """Hand the kernels of `mixkvq._cuda` to `mixkvq._torch`. Returns why that failed, or None; and a remedy."""
    build = f"build them with nvcc: MIXKVQ_CUDA=require {_REINSTALL}"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA",
            "install a torch that is built with it, and mixkvq again",
        )
    if PROBLEM is not None:
        return f"mixkvq._torch cannot be used: {PROBLEM}", f"build it beside the installed torch: {_REINSTALL}"
    try:
        import_module("mixkvq._torch").set_cuda(import_module("mixkvq._cuda")._C_API, _stream_function())
    except ModuleNotFoundError:
        return "no CUDA kernels in this build of mixkvq", build
    except (ImportError, AttributeError, ValueError) as error:
        return f"mixkvq._cuda cannot be used: {error}", build
    return None, ""


_OLDEST = 8, 0  # compute capability

CUDA_PROBLEM, CUDA_REMEDY = _load_cuda()
"""Why CUDA tensors have no kernels, or None, and what to do about it. Whether there is a device is another question."""


def cuda_problem(device: torch.device) -> tuple[str, str] | None:
    """Why a CUDA device has no kernels and what to do about it, or None."""
    if CUDA_PROBLEM is not None:
        return CUDA_PROBLEM, CUDA_REMEDY
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < _OLDEST:
        return "it is of compute capability {}.{}, the kernels need {}.{}".format(*found, *_OLDEST), "on a newer GPU"
    return None


def needed() -> None:
    """Raise RuntimeError where there are no operators, for a call that needs them."""
    if PROBLEM is not None:
        raise RuntimeError(
            f"torch.compile needs mixkvq._torch, and {PROBLEM}. Build it beside the installed torch: {_REINSTALL}"
        )


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


def _fake_workspace(*args: object) -> int:
    return 0


if PROBLEM is None:
    for _name, _fake in (
        ("attend", _fake_attend),
        ("attend_workspace", _fake_workspace),
        ("pack", _fake_pack),
        ("unpack", _fake_in_place),
        ("append_", _fake_in_place),
        ("salience_", _fake_in_place),
    ):
        torch.library.register_fake(f"mixkvq::{_name}", _fake)
