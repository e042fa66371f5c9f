"""Proof, before a layer is first packed, that its attention is what the kernel computes.

Keys and values are still plain then. The last query row is computed again by the kernel and compared with what the
model's attention function returned: mask, scaling, soft cap and attention sinks are measured, not assumed from a table.
One row leaves much open: a soft cap does nothing to small scores, a row that sees everything says nothing about masks.
So the function is also tried on rows that this call did not have: larger queries, and two rows of which a mask hides
different keys. A sliding window counts as proved once it hides something from the compared row. What a function will do
on longer texts without an argument that says so cannot be found out. No trial draws from torch's random numbers, but a
function that leaves something behind (attention weights kept on its module) leaves that of the last trial, once per
layer: the trials follow the call that they are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from . import ops, reasons
from .identity import Identity
from .masks import allowed, first_columns, rows_that_see
from .reasons import Reason

SINKS = ("s_aux", "sinks")
"""Names of an argument with learned logits for the softmax denominator."""
MIN_KEYS = 4  # over few keys a softmax hardly depends on its scale
_TRIAL_KEYS = 256  # the newest ones: a function may copy all that it is given
_PADDING_QUERIES = 4
_TF32_EPS = 2.0**-10
_SPREAD = 4.0  # largest score of a trial without a soft cap: a wrong scale or cap then shows


@dataclass(frozen=True)
class Proof:
    """How a layer's attention is computed.

    Attributes
    ----------
    function : str
        Name of the attention function, for people.
    identity : Identity
        Of that function: the proof holds for no other.
    arguments : frozenset of str
        Arguments that were given besides queries, keys, values and mask.
    softcap, sinks : bool
        Whether the soft cap and the sink logits of a call take part.
    masks : bool
        Whether it hides from every query what a mask hides from it.
    window : int or None
        The sliding window that hid something from the compared row.
    options : tuple of (str, value)
        Further arguments that may mean anything; the proof holds for these values.
    """

    function: str
    identity: Identity
    arguments: frozenset[str]
    softcap: bool
    sinks: bool
    masks: bool = True
    window: int | None = None
    options: tuple[tuple[str, Any], ...] = ()


def sink_logits(module: Any, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Learned logits in the softmax denominator (gpt-oss), float32 [Q], or None."""
    for name in SINKS:
        if name in arguments:
            sinks = arguments[name]
            break
    else:
        sinks = getattr(module, "sinks", None)
    if not isinstance(sinks, torch.Tensor) or sinks.dim() != 1:
        return None
    return sinks if sinks.dtype is torch.float32 and sinks.is_contiguous() else sinks.detach().float().contiguous()


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
    key, value = call.key.detach(), call.value.detach()
    batch, tokens = key.shape[0], key.shape[2]
    rows = rows_that_see(call.mask, batch, MIN_KEYS, key.device)
    if tokens < MIN_KEYS:
        rows = torch.zeros_like(rows)
    if output.dim() != 4 or output.shape[::2] != (batch, call.query.shape[1]):
        return reasons.other_layout(call.name)
    want = output.detach()[:, -1:]
    rows = rows & want.isfinite().flatten(1).all(1)
    if not bool(rows.any()):
        return None
    mask = None if call.mask is None else call.mask[:, :, -1:, :tokens]
    seen = replace(call, query=call.query[:, :, -1:].detach(), key=key, value=value, mask=mask)
    error, newest = 0.0, slice(-_TRIAL_KEYS, None)
    few = replace(
        seen, key=key[:, :, newest], value=value[:, :, newest], mask=None if mask is None else mask[..., newest]
    )
    for variant in _variants(call):
        error = variant.error(seen, want, rows, strictness=2)
        if error <= 1 and (masks := _tried(few, variant, rows)) is not None:
            return Proof(
                call.name,
                Identity(call.known_as),
                call.given,
                variant.softcap is not None,
                variant.sinks is not None,
                masks,
                _window(call, rows),
                call.options,
            )
    return reasons.mismatch(call.name, f"off by {error:.1f} times rounding" if error > 1 else "with larger queries")


def _variants(call: Any) -> list[Variant]:
    softcap, sinks = call.arguments.get("softcap"), sink_logits(call.module, call.arguments)
    return [
        Variant(cap, logits)
        for cap in ((softcap, None) if softcap else (None,))
        for logits in ((sinks, None) if sinks is not None else (None,))
    ]


def _window(call: Any, rows: torch.Tensor) -> int | None:
    """The sliding window of a call, if it hides a real token from the last query of one of these rows."""
    window, tokens = call.arguments.get("sliding_window"), call.key.shape[2]
    if not isinstance(window, int) or tokens <= window:
        return None
    # of all queries: the mask may have the window, too
    first = first_columns(call.mask, len(rows), tokens)[rows.cpu()]
    return window if bool((first < tokens - window).any()) else None


# ---- padding -------------------------------------------------------------------------------------------------------
def hides_padding(call: Any, output: Any, start: torch.Tensor | None) -> bool:
    """Whether real queries get the same without what is before their row's first token, which is not stored.

    The kernel respects masks; a function that it cannot stand in for may do anything with them. The newest queries are
    asked, which are most like those to come. With dropout or in cross attention nothing can be told: the answer is no.

    Parameters
    ----------
    call : hook.Call
        The attention call, with plain keys and values.
    output : tensor [B, n, ...]
        What the attention function returned.
    start : int64 tensor [B] or None
        First column of every row that the mask shows.
    """
    if start is None or not bool(start.any()):
        return True
    start = start.to(call.key.device)
    batch, tokens, n = call.key.shape[0], call.key.shape[2], call.query.shape[2]
    want = output[0] if isinstance(output, tuple) else output
    if call.arguments.get("dropout") or not (isinstance(want, torch.Tensor) and want.shape[:2] == (batch, n)):
        return False
    if n > tokens:  # cross attention: queries have no columns of their own
        return False
    column = torch.arange(tokens, device=call.key.device)
    padding = (column < start.view(-1, 1)).view(batch, 1, tokens, 1)
    key, value = call.key.masked_fill(padding, 0), call.value.masked_fill(padding, 0)
    for few in dict.fromkeys((min(n, _PADDING_QUERIES), n)):  # all, if other arguments are made for all
        mask = None if call.mask is None else call.mask[:, :, -few:]
        got = _again(replace(call, query=call.query[:, :, -few:], mask=mask), key, value)
        if got is not None and got.shape == want[:, -few:].shape:
            break
    else:
        return False
    real = column[tokens - few :] >= start.view(-1, 1)
    want, got = want.detach()[:, -few:][real].float(), got[real].float()
    tolerance = max(1e-4, 4 * torch.finfo(call.query.dtype).eps) * want.abs().max()
    return bool(((got - want).abs() <= tolerance).all())


def _again(call: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """What the function gives for a call that the model did not make; None if it dislikes it. No trace is left."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = call.original(key, value)
    except Exception:  # whatever a function dislikes
        return None
    output = result[0] if isinstance(result, tuple) else result
    return output.detach() if isinstance(output, torch.Tensor) else None


# ---- trials: rows that the call did not have -----------------------------------------------------------------------
def _tried(call: Any, variant: Variant, rows: torch.Tensor) -> bool | None:
    """Try larger queries, with masks if possible: whether masks are respected; None if it is not this variant."""
    larger = _enlarged(call)
    for dtype in (call.query.dtype, torch.bool) if call.mask is None else (call.mask.dtype,):
        masked = replace(call, query=torch.cat([larger, call.query], 2), mask=_sparse_masks(call, dtype))
        if _succeeds(masked, variant, rows):
            return True
    return False if _succeeds(replace(call, query=larger), variant, rows) else None


def _succeeds(call: Any, variant: Variant, rows: torch.Tensor) -> bool:
    output = _again(call, call.key, call.value)
    batch, heads, n, dim = call.query.shape
    if output is None or output.shape != (batch, n, heads, dim):
        return False
    if call.mask is not None:  # of what sparse masks leave, a row with padding may see nothing
        rows = rows & allowed(call.mask).any(-1).flatten(1).all(1)
        if not bool(rows.any()):
            return False
    return variant.error(call, output, rows, strictness=4) <= 1


def _enlarged(call: Any) -> torch.Tensor:
    """The queries, where they are small so much larger that a scale or soft cap shows."""
    softcap = call.arguments.get("softcap")
    scores = _scores(call, call.query.float(), call.key.float())
    if call.mask is not None:
        scores = torch.where(allowed(call.mask), scores, 0.0)
    largest = scores.abs().nan_to_num(0.0, 0.0, 0.0).amax((2, 3), keepdim=True)
    factor = (softcap / 2 if softcap else _SPREAD) / largest.clamp(min=1e-6)
    room = 1e4 / call.query.float().abs().amax((2, 3), keepdim=True).clamp(min=1e-6)
    larger: torch.Tensor = call.query * factor.minimum(room).clamp(min=1.0)  # in float32: factors may exceed float16
    return larger.to(call.query.dtype)


def _sparse_masks(call: Any, dtype: torch.dtype) -> torch.Tensor:
    """Masks of two rows, [B, Q or 1, 2, tokens]: one leaves every second key, the other every eighth."""
    batch, tokens = call.key.shape[0], call.key.shape[2]
    column = torch.arange(tokens, device=call.key.device)
    left = torch.stack([column % 2 == 0, column % 8 == 0])
    hidden = False if dtype == torch.bool else torch.finfo(dtype).min
    mask = call.mask
    if mask is None:
        everything = True if dtype == torch.bool else 0.0
        mask = torch.full((1, 1, 1, tokens), everything, device=call.key.device)
    return torch.where(left, mask.to(dtype), hidden).expand(batch, -1, -1, -1).contiguous()


# ---- comparing -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """A soft cap and sink logits for the kernel, each None or what the call gives."""

    softcap: float | None
    sinks: torch.Tensor | None

    def error(self, call: Any, want: torch.Tensor, rows: torch.Tensor, *, strictness: float) -> float:
        """Largest difference between the kernel and ``want`` [B, n, Q, D], in units of what is allowed."""
        layer, scaling = _plain_layer(call.key, call.value), call.arguments.get("scaling")
        got = ops.attend(layer, call.query, call.mask, False, scaling, self.softcap or 0.0, self.sinks, "exact").float()
        allowance = self._tolerance(call, got, want.float(), strictness)
        error = (got - want.float()).abs().flatten(2).amax(2) / allowance
        return float(error[rows].nan_to_num(torch.inf).max()) if bool(rows.any()) else 0.0

    def _tolerance(self, call: Any, got: torch.Tensor, want: torch.Tensor, strictness: float) -> torch.Tensor:
        """How far apart two right results may be, [B, n].

        1e-4 or four roundings of the largest value; in 16 bits also some times the error of plain 16-bit attention.
        """
        coarsest = max((call.query.dtype, call.key.dtype, call.output_dtype), key=lambda dtype: torch.finfo(dtype).eps)
        eps = _TF32_EPS if _rounds_to_tf32(call.query) else torch.finfo(coarsest).eps
        tolerance = max(1e-4, 4 * eps) * want.flatten(2).abs().amax(2).clamp(min=1e-6)
        if eps < 1e-4:
            return tolerance
        naive = self._naive_attention(call, coarsest)
        return tolerance + strictness * (naive.float() - got).flatten(2).abs().amax(2).nan_to_num(0.0)

    def _naive_attention(self, call: Any, dtype: torch.dtype) -> torch.Tensor:
        """Attention in 16-bit arithmetic, every intermediate rounded, [B, n, Q, D]."""
        query, key, value = (t.to(dtype) for t in (call.query, call.key, call.value))
        scores = _scores(call, query, key)
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if (mask := call.mask) is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        batch, heads, n, tokens = scores.shape
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.to(dtype).view(1, -1, 1, 1).expand(batch, -1, n, 1)], -1)
        weights = scores.softmax(-1, torch.float32)[..., :tokens].to(dtype)
        grouped = weights.view(batch, key.shape[1], -1, tokens)
        return torch.matmul(grouped, value).view(batch, heads, n, -1).transpose(1, 2)


def _rounds_to_tf32(query: torch.Tensor) -> bool:
    """Whether torch may round factors of float32 products to 11 bits, as GPUs multiply faster."""
    if not query.is_cuda or query.dtype is not torch.float32:
        return False
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")  # from torch 2.9 on
    return chosen == "tf32" or (chosen == "none" and torch.get_float32_matmul_precision() != "highest")


def _scores(call: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled products [B, Q, n, tokens]."""
    batch, heads, n, head_dim = query.shape
    scaling = call.arguments.get("scaling")
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    scores: torch.Tensor = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, n, -1)
    scores *= head_dim**-0.5 if scaling is None else scaling
    return scores


def _plain_layer(key: torch.Tensor, value: torch.Tensor) -> Any:
    """Plain keys and values as the exact window of a layer without blocks."""
    batch, heads, tokens, _ = key.shape
    none = torch.zeros(batch, dtype=torch.int64, device=key.device)
    return ops.layer(key, value, none + tokens, none, 0, [], none.new_zeros(batch, heads, 0), none, None)
