"""Salience statistics and attention in float64 (the contract of ``mkvq_salience`` and ``mkvq_attend``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .numbers import F32, Array, Floats, widen
from .unpacking import unpack

Doubles = NDArray[np.float64]


def salience(q: Array, kv_heads: int, power: int, first: int = 0, *, dtype: str | None = None) -> Doubles:
    """Sum of ``|q|**power`` over the queries from ``first`` on: tokens in order, inside a token the heads of the group.

    Parameters
    ----------
    q : ndarray, [Q, n, D]
        One batch row; uint16 bit patterns when ``dtype`` is ``"bfloat16"``.
    kv_heads : int
        H, divides Q.
    power : {1, 2}

    Returns
    -------
    ndarray, float64, [H, D]
    """
    wide = widen(q, dtype or q.dtype.name).astype(np.float64)
    heads, tokens, dim = wide.shape
    term = np.abs(wide) if power == 1 else wide * wide
    term = term.reshape(kv_heads, heads // kv_heads, tokens, dim)
    total = np.zeros((kv_heads, dim))
    for token in range(first, tokens):
        for head in range(heads // kv_heads):
            total = total + term[:, head, token]
    return total


def importance(total: Doubles, count: int, power: int) -> Floats:
    """I_d: mean absolute value (power 1) or root mean square (power 2) of ``count`` head-tokens; 1 for none."""
    if count == 0:
        return np.ones(total.shape, F32)
    mean = total / count
    return np.asarray(np.sqrt(mean) if power == 2 else mean).astype(F32)


def attend(
    q: Array,
    records: Sequence[Sequence[Sequence[bytes]]],
    k: Array,
    v: Array,
    exact: Sequence[int] | Array,
    *,
    dtype: str | None = None,
    mu: Array | None = None,
    start: Sequence[int] | Array | None = None,
    sink_length: int = 0,
    mask: Array | str | None = None,
    scaling: float | None = None,
    softcap: float = 0.0,
    sink_logits: Array | None = None,
) -> Doubles:
    """Attention over sinks, packed blocks and window, in float64 on the unpacked values.

    Parameters
    ----------
    q : ndarray, [B, Q, n, D]
    records : [B][H] lists of records
    k, v : ndarray, [B, H, C, D]
        Exact buffers; row b holds ``exact[b]`` tokens, the first ``min(sink_length, exact[b])`` of them sinks.
    dtype : str, optional
        Of q, k and v; needed for bfloat16 only.
    mu : ndarray, float16, [B, H, D], optional
    start : [B], optional
        Mask column of token 0 of each row.
    mask : "causal", or bool or float ndarray, broadcastable to [B, Q, n, columns], optional
        Causal: query i of row b stands at token ``N_b - n + i``.
    scaling : float, optional
        ``D ** -0.5`` by default.
    softcap : float
        0: none.
    sink_logits : ndarray, [Q], optional

    Returns
    -------
    ndarray, float64, [B, Q, n, D]
        Zeros where a query may see no token.
    """
    wide_q, wide_k, wide_v = (widen(x, dtype or x.dtype.name) for x in (q, k, v))
    batch, heads, count, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape, np.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // group
            blocks = [unpack(record, None if mu is None else mu[b, kv]) for record in records[b][kv]]
            key = _history(wide_k[b, kv], exact[b], sink_length, [part[0] for part in blocks])
            value = _history(wide_v[b, kv], exact[b], sink_length, [part[1] for part in blocks])
            tokens = len(key)
            allowed, added = _mask(mask, (batch, heads, count), b, h, 0 if start is None else int(start[b]), tokens)
            scores = wide_q[b, h].astype(np.float64) @ key.T * (dim**-0.5 if scaling is None else scaling)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            for i in range(count):
                seen = allowed[i]
                if seen.any():
                    sink = None if sink_logits is None else float(sink_logits[h])
                    out[b, h, i] = _softmax_mean(scores[i, seen] + added[i, seen], value[seen], sink)
    return out


def _history(window: Floats, exact: int, sink_length: int, blocks: list[Floats]) -> Doubles:
    sinks = min(sink_length, int(exact))
    return np.concatenate([window[:sinks], *blocks, window[sinks : int(exact)]]).astype(np.float64)


def _mask(
    mask: Array | str | None, shape: tuple[int, int, int], b: int, h: int, start: int, tokens: int
) -> tuple[NDArray[np.bool_], Doubles]:
    """Which tokens each query may see, and what is added to its scores: both [n, tokens]."""
    count = shape[2]
    everything, nothing = np.ones((count, tokens), bool), np.zeros((count, tokens))
    if mask is None:
        return everything, nothing
    if isinstance(mask, str):
        return np.arange(tokens) <= tokens - count + np.arange(count)[:, None], nothing
    cut = np.broadcast_to(mask, (*shape, mask.shape[-1]))[b, h, :, start : start + tokens]
    if mask.dtype == bool:
        return cut, nothing
    return cut > -np.inf, cut.astype(np.float64)


def _softmax_mean(scores: Doubles, value: Doubles, sink: float | None) -> Doubles:
    top = scores.max()
    if sink is not None:
        top = max(top, sink)
    with np.errstate(invalid="ignore"):  # inf - inf: a NaN is the answer
        weight = np.exp(scores - top)
        total = weight.sum() + (0.0 if sink is None else np.exp(sink - top))
        return np.asarray(weight @ value / total, np.float64)
