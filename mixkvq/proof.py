"""Proof, before a layer is first packed, that its attention is what the kernel computes.

Keys and values are still plain then. The last query row is computed again by the kernel and compared with what the
model's attention function returned: mask, scaling, soft cap and attention sinks are measured, not assumed from a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import ops, reasons
from .masks import rows_that_see
from .reasons import Reason

MIN_KEYS = 4  # over few keys a softmax hardly depends on its scale


@dataclass(frozen=True)
class Proof:
    """How a layer's attention is computed.

    Attributes
    ----------
    function : str
        Name of the attention function.
    arguments : frozenset of str
        Arguments that were given besides queries, keys, values and mask.
    softcap, sinks : bool
        Whether the soft cap and the sink logits of a call take part.
    """

    function: str
    arguments: frozenset[str]
    softcap: bool
    sinks: bool


def sink_logits(module: Any, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Learned logits in the softmax denominator (gpt-oss), float32 [Q], or None."""
    sinks = arguments.get("s_aux", arguments.get("sinks", getattr(module, "sinks", None)))
    return sinks.detach().float().contiguous() if isinstance(sinks, torch.Tensor) and sinks.dim() == 1 else None


def prove(call: Any, output: torch.Tensor) -> Proof | Reason | None:
    """Find the variant of the kernel that gives ``output``.

    Parameters
    ----------
    call : hook.Call
        The attention call, with plain keys and values.
    output : tensor [B, n, Q, D]
        What the attention function returned.

    Returns
    -------
    Proof, or the reason why the kernel cannot stand in, or None if this call cannot tell
    """
    query, key, value = call.query[:, :, -1:].detach(), call.key.detach(), call.value.detach()
    batch, tokens = key.shape[0], key.shape[2]
    rows = rows_that_see(call.mask, batch, MIN_KEYS) if tokens >= MIN_KEYS else torch.zeros(batch, dtype=torch.bool)
    if output.dim() != 4 or output.shape[::2] != (batch, query.shape[1]):
        return reasons.other_layout(call.name)
    want = output.detach()[:, -1:].float()
    rows = rows & want.isfinite().flatten(1).all(1)
    if not bool(rows.any()):
        return None
    mask = None if call.mask is None else call.mask[:, :, -1:]
    handle = _plain_layer(key, value)
    softcap, sinks = call.arguments.get("softcap"), sink_logits(call.module, call.arguments)
    for cap in (softcap, None) if softcap else (None,):
        for logits in (sinks, None) if sinks is not None else (None,):
            scaling = call.arguments.get("scaling")
            got = ops.attend(handle, query, mask, False, scaling, cap or 0.0, logits, "exact").float()
            error = (got - want)[rows].flatten(1).abs().amax(1)
            if bool((error <= _tolerance(call, got, want, mask, cap, logits)[rows]).all()):
                return Proof(call.name, call.given, cap is not None, logits is not None)
    return reasons.mismatch(call.name, float(error.max()))


def _plain_layer(key: torch.Tensor, value: torch.Tensor) -> Any:
    """Plain keys and values as the exact window of a layer without blocks."""
    batch, heads, tokens, _ = key.shape
    exact, none = torch.full((batch,), tokens), torch.zeros(batch, dtype=torch.int64)
    return ops.layer(key, value, exact, none, 0, [], torch.zeros(batch, heads, 0, dtype=torch.int64), none, None)


def _tolerance(
    call: Any,
    got: torch.Tensor,
    want: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """How far apart two right results may be, [B].

    1e-4 or four roundings of the largest value; in 16 bits also twice the error of plain 16-bit attention in this row.
    """
    coarsest = max((call.query.dtype, call.key.dtype, call.output_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    eps = torch.finfo(coarsest).eps
    tolerance = max(1e-4, 4 * eps) * want.flatten(1).abs().amax(1).clamp(min=1e-6)
    if eps < 1e-4:
        return tolerance
    naive = _naive_attention(call, coarsest, mask, softcap, sinks)
    return tolerance + 2 * (naive.float() - got).flatten(1).abs().amax(1).nan_to_num(0.0)


def _naive_attention(
    call: Any, dtype: torch.dtype, mask: torch.Tensor | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """The last query row in 16-bit arithmetic, every intermediate rounded, [B, 1, Q, D]."""
    query, key, value = (t.detach().to(dtype) for t in (call.query[:, :, -1:], call.key, call.value))
    batch, heads, _, head_dim = query.shape
    scaling = call.arguments.get("scaling")
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, 1, -1) * (
        head_dim**-0.5 if scaling is None else scaling
    )
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(batch, -1, 1, 1)], -1)
    weights = scores.softmax(-1, torch.float32)[..., : key.shape[2]].to(dtype)
    return (
        torch.matmul(weights.view(batch, key.shape[1], -1, key.shape[2]), value)
        .view(batch, heads, 1, -1)
        .transpose(1, 2)
    )
