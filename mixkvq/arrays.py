"""The core's verbs on NumPy arrays: what `mixkvq.ops` is for tensors. Needs NumPy only; not the fast path of a model.

Arrays of keys, values and queries are float32, float16, or bfloat16 as uint16 bit patterns, with any strides that are
whole elements. `docs/format.md` describes the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .config import ALLOCATE, BlockCodec

DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}
"""The core's codes of element types (``mkvq_dtype``)."""

PRECISIONS = {"default": 0, "exact": 1, "fast": 2}
"""The core's codes of how attention multiplies (``mkvq_precision``)."""

_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_SLAB_SHIFT = 40

Records = Sequence[Sequence[Sequence[bytes]]]
"""Records of every batch row, KV head and block."""


# ---- codec ---------------------------------------------------------------------------------------------------------
def codec_numbers(codec: BlockCodec) -> tuple[list[int], list[float]]:
    """A codec as plain numbers, as the torch ops take it.

    Returns
    -------
    fields : list of int
        The integer fields of ``mkvq_codec`` in order, ``head_dim`` to ``budget_columns``, then six channel counts per
        pattern.
    thresholds : list of float
        High and low.
    """
    metadata, ranges = ("e5m3", "fp16"), ("minmax", "search", "search-mse")
    fields = [
        codec.head_dim,
        codec.block_length,
        DTYPES[codec.dtype],
        ALLOCATE.index(codec.allocate),
        codec.key_group,
        metadata.index(codec.key_metadata),
        ranges.index(codec.key_range),
        int(codec.key_reference),
        codec.value_bits,
        codec.value_group,
        metadata.index(codec.value_metadata),
        ranges.index(codec.value_range),
        int(codec.value_rotation),
        ("model", "measured").index(codec.pattern_cost),
        codec.budget_columns,
    ]
    return fields + [n for p in codec.patterns for n in p], [codec.threshold_high, codec.threshold_low]


def codec_of_numbers(fields: Sequence[int], thresholds: Sequence[float]) -> _core.Codec:
    """The checked codec of the core from what `codec_numbers` returned."""
    patterns = [fields[i : i + 6] for i in range(15, len(fields), 6)]
    return cast(_core.Codec, cast(Any, _core.Codec)(*fields[:15], *thresholds, patterns))


def precision_code(precision: str) -> int:
    """The core's code of a precision; ValueError for an unknown name."""
    code = PRECISIONS.get(precision)
    if code is None:
        raise ValueError(f"precision is {precision!r}, must be one of {', '.join(map(repr, PRECISIONS))}")
    return code


@lru_cache(maxsize=256)
def core_codec(codec: BlockCodec) -> _core.Codec:
    """The checked codec of the core. Raises ValueError naming the field, its value and what is allowed."""
    return codec_of_numbers(*codec_numbers(codec))


# ---- records -------------------------------------------------------------------------------------------------------
def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Zeros on a 64-byte boundary, as records need."""
    room = np.zeros(nbytes + 64, np.uint8)
    shift = -room.ctypes.data % 64
    return room[shift : shift + nbytes]


def _rows(name: str, values: ArrayLike) -> NDArray[np.int64]:
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"{name} is of dtype {given.dtype}, must be of whole numbers")
    return np.ascontiguousarray(given, np.int64)


def _half(mu: ArrayLike) -> NDArray[np.float16]:
    """A copy, of this machine's byte order."""
    given = np.asarray(mu)
    if given.dtype.kind not in "fu" or given.dtype.itemsize != 2:
        raise ValueError(f"mu is of dtype {given.dtype}, must be float16 or uint16")
    return np.array(given, given.dtype.newbyteorder("="), order="C").view(np.float16)


def _flags(has_mu: ArrayLike) -> NDArray[np.uint8]:
    """A copy."""
    given = np.asarray(has_mu)
    if given.dtype.kind not in "biu":
        raise ValueError(f"has_mu is of dtype {given.dtype}, must be uint8")
    return np.array(given != 0, np.uint8)


@dataclass(frozen=True)
class Packed:
    """What `pack` returns.

    Attributes
    ----------
    records : list of list of list of bytes
        Of every batch row, KV head and block.
    raised : int64 [B, H, blocks]
        Raised scales of each record (docs/format.md section 4).
    mu : float16 [B, H, D] or None
        Key reference of every head; None unless the codec has one.
    has_mu : uint8 [B, H] or None
        1 where ``mu`` is set.
    """

    records: list[list[list[bytes]]]
    raised: NDArray[np.int64]
    mu: NDArray[np.float16] | None
    has_mu: NDArray[np.uint8] | None


def pack(
    codec: BlockCodec,
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    first: ArrayLike | None = None,
    blocks: ArrayLike | None = None,
    importance: NDArray[np.float32] | None = None,
    mu: NDArray[Any] | None = None,
    has_mu: NDArray[np.uint8] | None = None,
) -> Packed:
    """Pack whole blocks of keys and values.

    Parameters
    ----------
    codec : BlockCodec
        How; its dtype says what the arrays hold.
    k, v : array [B, H, n, D]
        Keys and values.
    first : int [B], optional
        Token where the first block of each row begins; default 0.
    blocks : int [B], optional
        Blocks to pack in each row; default all whole blocks from ``first`` on.
    importance : float32 [B, H, D], optional
        I_d, finite and not negative; default 1.
    mu, has_mu : float16 or uint16 [B, H, D] and uint8 [B, H], optional
        Key references known from earlier blocks. Not modified.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    handle = core_codec(codec)
    batch, heads, tokens, head_dim = k.shape
    starts = np.zeros(batch, np.int64) if first is None else _rows("first", first)
    counts = np.maximum(tokens - starts, 0) // codec.block_length if blocks is None else _rows("blocks", blocks)
    most, bound = max(int(counts.max(initial=0)), 0), handle.record_bound
    out = _aligned(batch * heads * most * bound)
    sizes, raised = np.zeros((2, batch, heads, most), np.int64)
    if codec.key_reference:
        mu = np.zeros((batch, heads, head_dim), np.float16) if mu is None else _half(mu)
        has_mu = np.zeros((batch, heads), np.uint8) if has_mu is None else _flags(has_mu)
    else:
        mu = has_mu = None
    weights = None if importance is None else np.ascontiguousarray(importance)
    _core.pack(handle, k, v, starts, counts, weights, mu, has_mu, out, bound, sizes, raised)
    slots = out.reshape(batch, heads, most, bound)
    records = [
        [[slots[b, h, j, : sizes[b, h, j]].tobytes() for j in range(counts[b])] for h in range(heads)]
        for b in range(batch)
    ]
    return Packed(records, raised, mu, has_mu)


def _layer(
    records: Records,
    k: NDArray[Any],
    v: NDArray[Any],
    exact: ArrayLike,
    start: ArrayLike | None = None,
    sink_length: int = 0,
    mu: ArrayLike | None = None,
) -> _core.Layer:
    """A handle over one slab that holds all records."""
    batch, heads = k.shape[:2]
    if len(records) != batch or any(len(row) != heads for row in records):
        raise ValueError(f"records is for {len(records)} rows, must be for {batch} rows of {heads} heads (wrong shape)")
    blocks = np.array([len(row[0]) if heads else 0 for row in records], np.int64)
    if any(len(head) != blocks[b] for b, row in enumerate(records) for head in row):
        raise ValueError("records must have as many blocks in every head of a row (wrong shape)")
    most = int(blocks.max(initial=0))
    place = np.full((batch, heads, most), -1, np.int64)
    flat = [(at, record) for at, record in zip(np.ndindex(batch, heads, most), _filled(records, most), strict=True)]
    slab = _aligned(sum(-(-len(record) // 64) * 64 for _, record in flat if record is not None))
    offset = 0
    for at, record in flat:
        if record is not None:
            place[at] = offset
            slab[offset : offset + len(record)] = np.frombuffer(record, np.uint8)
            offset += -(-len(record) // 64) * 64
    base = np.array([slab.ctypes.data], np.uint64)
    starts = None if start is None else _rows("start", start)
    sizes, reference = np.array([slab.nbytes], np.int64), None if mu is None else _half(mu)
    handle = _Layer(k, v, _rows("exact", exact), starts, sink_length, base, sizes, place, blocks, reference)
    handle.slab = slab
    return handle


class _Layer(_core.Layer):
    __slots__ = ("slab",)  # the core keeps the addresses of slabs, not the slabs
    slab: NDArray[np.uint8]


def _filled(records: Records, most: int) -> list[bytes | None]:
    """All records in order, None in places of a row that has fewer than ``most`` blocks."""
    return [head[j] if j < len(head) else None for row in records for head in row for j in range(most)]


def unpack(record: bytes, *, mu: ArrayLike | None = None, dtype: str = "float32") -> tuple[NDArray[Any], NDArray[Any]]:
    """Decode one record.

    Parameters
    ----------
    record : bytes
        A record.
    mu : float16 or uint16 [D], optional
        Key reference, needed when the record is coded against one.
    dtype : {"float32", "float16", "bfloat16"}
        Of the result; bfloat16 comes as uint16 bit patterns.

    Returns
    -------
    k, v : array [T, D]

    Raises
    ------
    ValueError
        For what is not a sound record, or needs ``mu``.
    """
    info = inspect(record)
    k, v = (np.empty((1, 1, info["tokens"], info["head_dim"]), _numpy_dtype(dtype)) for _ in range(2))
    window = np.empty((1, 1, 0, info["head_dim"]), np.float32)
    reference = None if mu is None else np.asarray(mu)[None, None]
    _layer([[[record]]], window, window, [0], mu=reference).unpack(k, v, np.zeros(1, np.int64))
    return k[0, 0], v[0, 0]


def _numpy_dtype(dtype: str) -> Any:
    if dtype not in _NUMPY:
        raise ValueError(f"dtype is {dtype!r}, must be one of {', '.join(map(repr, _NUMPY))}")
    return _NUMPY[dtype]


def inspect(record: bytes) -> dict[str, Any]:
    """Header fields and section sizes of a record, which is checked (``mkvq_record_info`` in ``csrc/mixkvq.h``).

    Raises
    ------
    ValueError
        For what is not a sound record of this version.
    """
    return _core.inspect(record)


# ---- queries -------------------------------------------------------------------------------------------------------
def attend(
    q: NDArray[Any],
    records: Records,
    k: NDArray[Any],
    v: NDArray[Any],
    exact: ArrayLike,
    *,
    dtype: str | None = None,
    mu: ArrayLike | None = None,
    start: ArrayLike | None = None,
    sink_length: int = 0,
    mask: str | NDArray[Any] | None = None,
    scaling: float | None = None,
    softcap: float = 0.0,
    sink_logits: ArrayLike | None = None,
    precision: str = "default",
) -> NDArray[np.float32]:
    """Attention over packed blocks and a window of exact tokens.

    A row's tokens are: its sinks, its packed blocks, the rest of its window.

    Parameters
    ----------
    q : array [B, Q, n, D]
        Queries; query head h reads KV head ``h // (Q / H)``.
    records : list of list of list of bytes
        Of every row, KV head and block.
    k, v : array [B, H, C, D]
        The exact window, of which row b uses the first ``exact[b]`` tokens.
    exact : int [B]
        Tokens in the window.
    dtype : {"float32", "float16", "bfloat16"}, optional
        What uint16 arrays hold; default bfloat16.
    mu : float16 or uint16 [B, H, D], optional
        Key references.
    start : int [B], optional
        Mask column of each row's token 0; default 0.
    sink_length : int
        Tokens of the window that stand before the packed blocks.
    mask : "causal" or bool or float array, optional
        Broadcastable to [B, Q, n, columns]; True may attend, floats are added. "causal": the last query stands at the
        last token.
    scaling : float, optional
        Default ``D ** -0.5``.
    softcap : float
        c of ``c * tanh(score / c)``; 0: none.
    precision : {"default", "exact", "fast"}
        How codes are multiplied: "exact" in float32, within 1e-5 of float64 attention on the unpacked values; with
        queries and probabilities in 16 bits, or, "fast", queries in 8 bits on 2-bit keys: errors that grow with the
        logits, below 2e-3 (6e-2) where their standard deviation is at most 16 (2).
    sink_logits : float32 [Q], optional
        Logits added to the softmax denominator.

    Returns
    -------
    float32 [B, Q, n, D]

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    q, k, v = (_typed(x, dtype) for x in (q, k, v))
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask is {mask!r}, must be 'causal', an array or None")
    allowed = None if mask is None or isinstance(mask, str) else _typed(_mask(mask, q.shape), dtype)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if sink_logits is None else np.ascontiguousarray(sink_logits, np.float32)
    out = np.empty(q.shape, np.float32)
    handle = _layer(records, k, v, exact, start, sink_length, mu)
    handle.attend(q, out, allowed, isinstance(mask, str), scale, softcap, sinks, precision_code(precision))
    return out


def _typed(x: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    if dtype is not None:
        _numpy_dtype(dtype)
    return x.view(np.float16) if dtype == "float16" and x.dtype == np.uint16 else x


def _mask(mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    mask = mask.astype(np.float32) if mask.dtype == np.float64 else mask
    mask = mask[(None,) * (4 - mask.ndim)]
    return np.broadcast_to(mask, (*shape[:3], mask.shape[3]))


def salience(
    q: NDArray[Any],
    kv_heads: int,
    *,
    power: int,
    first: ArrayLike | None = None,
    sum: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Sums of |q|^power per KV head and channel, over tokens in order.

    Parameters
    ----------
    q : array [B, Q, n, D]
        Queries; uint16 holds bfloat16.
    kv_heads : int
        H, a divisor of Q.
    power : {1, 2}
        1 for the mean absolute value, 2 for the root mean square.
    first : int [B], optional
        First query of each row that counts; default 0.
    sum : float64 [B, H, D], optional
        Sums of earlier calls to go on from. Not modified.

    Returns
    -------
    float64 [B, H, D]

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    total = np.zeros((q.shape[0], kv_heads, q.shape[3])) if sum is None else np.array(sum, np.float64)
    _core.salience(q, kv_heads, power, None if first is None else _rows("first", first), total)
    return total
