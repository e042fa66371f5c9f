"""Attention of a decode step over plain bfloat16 keys and values in every way that torch offers.

Each formulation is run under each back end of `scaled_dot_product_attention`; what a back end refuses is left out, and
why is kept. The fastest is the rival.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, Q, 1, D], k and v [B, H, N, D] -> [B, 1, Q, D]."""


def _as_called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers calls it."""
    return sdpa(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a KV head as rows of one attention: every key is read once."""
    batch, heads, _, dim = q.shape
    return sdpa(q.view(batch, k.shape[1], -1, dim), k, v).reshape(batch, 1, heads, dim)


def formulations(group: int) -> dict[str, Attention]:
    """By name; one query head per KV head leaves nothing to group."""
    return {"as called": _as_called} if group == 1 else {"enable_gqa": _as_called, "rows": _rows}


def bound(function: Attention, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """A call with one back end and nothing else."""
    chosen = BACKENDS[backend]

    def call() -> Tensor:
        with sdpa_kernel(chosen):
            return function(q, k, v)

    return call


def all_of(
    group: int, device: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Calls by name, and reasons of what cannot run."""
    calls, refused = {}, {}
    backends = ("flash", "math") if device == "cpu" else ("flash", "cudnn", "efficient")
    for backend in backends:
        for name, function in formulations(group).items():
            call, full = bound(function, backend, q, k, v), f"SDPA {backend}, {name}"
            try:
                call()
                if device != "cpu":
                    torch.cuda.synchronize()
            except RuntimeError as error:
                refused[full] = str(error).splitlines()[0]
                continue
            calls[full] = call
    return calls, refused
