"""From the keys and values of a block to the bytes of its record (docs/format.md sections 2 to 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .budget import choose_pooled
from .codec import Codec
from .coding import Coded, code_groups
from .layout import (
    METADATA,
    STORED_TIERS,
    Header,
    codec_sections,
    exact_nbytes,
    pack_map,
    to_words,
)
from .numbers import F32, Array, Floats, eight_sum, hadamard, storage, widen
from .tiers import TIER_BITS, TIER_EXACT, Tiers, choose_tiers, tier_costs

Reference = Array
"""float16 [D]"""


def pack_head(
    codec: Codec, k: Array, v: Array, importance: Floats | None = None, mu: Reference | None = None
) -> tuple[list[bytes], Reference | None, list[int]]:
    """Pack all whole blocks of one head, in order.

    Parameters
    ----------
    codec : Codec
    k, v : ndarray, [n, D]
        In the codec's dtype; bfloat16 as uint16 bit patterns. Tokens after the last whole block are left out.
    importance : ndarray, float32, [D], optional
        I_d; 1 when absent.
    mu : ndarray, float16, [D], optional
        The head's reference; None when not set yet.

    Returns
    -------
    records : list of bytes
    mu : ndarray, float16, [D], or None
        The reference after these blocks.
    raised : list of int
        Raised scales of each record.
    """
    heads = [None if mu is None else np.asarray(mu)]
    weights = None if importance is None else importance[None]
    records, references, raised = pack_heads(codec, k[None], v[None], weights, heads)
    return records[0], references[0], raised[0]


def pack_block(
    codec: Codec,
    k: Array,
    v: Array,
    importance: Floats | None = None,
    mu: Reference | None = None,
    *,
    tiers: Array | None = None,
) -> tuple[bytes, Reference | None, int]:
    """Pack one block; as `pack_head` with ``k`` and ``v`` of [T, D]. ``tiers`` [D], if given, replaces the choice."""
    if k.shape != v.shape or k.shape[1] != codec.head_dim:
        raise ValueError(f"k is {k.shape} and v is {v.shape}, must be alike with head_dim {codec.head_dim}")
    weights = None if importance is None else importance[None]
    chosen = None if tiers is None else [tiers]
    records, references, raised = pack_heads(codec, k[None], v[None], weights, [mu], tiers=chosen)
    return records[0][0], references[0], raised[0][0]


def pack_heads(
    codec: Codec,
    k: Array,
    v: Array,
    importance: Floats | None = None,
    mu: Sequence[Reference | None] | None = None,
    *,
    tiers: Sequence[Array] | None = None,
) -> tuple[list[list[bytes]], list[Reference | None], list[list[int]]]:
    """Pack all whole blocks of all heads of a batch row: with ``allocate="layer"`` they share their budget.

    Parameters
    ----------
    codec : Codec
    k, v : ndarray, [H, n, D]
    importance : ndarray, float32, [H, D], optional
    mu : sequence of (float16 [D] or None), optional
        Of every head.
    tiers : sequence of (uint8 [D]), optional
        Tier ids of every head, instead of choosing them.

    Returns
    -------
    records, mu, raised
        As `pack_head`, a list of each for every head.
    """
    k, v = storage(k, codec.dtype), storage(v, codec.dtype)
    heads = range(len(k))
    weights = np.ones((len(k), codec.head_dim), F32) if importance is None else importance.astype(F32)
    references: list[Reference | None] = [None] * len(k) if mu is None else list(mu)
    records: list[list[bytes]] = [[] for _ in heads]
    raised: list[list[int]] = [[] for _ in heads]
    for begin in range(0, k.shape[1] - codec.block_length + 1, codec.block_length):
        block = slice(begin, begin + codec.block_length)
        relative = [_relative(codec, k[h, block], references[h]) for h in heads]
        for h, chosen in enumerate(_choose(codec, relative, weights) if tiers is None else tiers):
            coded, head = None, relative[h]
            if chosen is not None and head is not None:
                x, reference = head
                coded = _coded_record(codec, x, k[h, block], v[h, block], chosen)
            if coded is None:
                coded = _exact_record(codec, k[h, block], v[h, block]), 0
            else:
                references[h] = reference
            records[h].append(coded[0])
            raised[h].append(coded[1])
    return records, references, raised


def _relative(codec: Codec, k: Array, mu: Reference | None) -> tuple[Floats, Reference | None] | None:
    """Keys [T, D] as they will be coded, and the reference; None if they cannot be coded."""
    x = widen(k, codec.dtype)
    if codec.allocate == "exact" or not np.isfinite(x).all():
        return None
    if not codec.key_reference:
        return x, mu
    mu = _reference(x) if mu is None else mu
    return None if mu is None else (np.asarray(x - mu.astype(F32), F32), mu)


def _choose(
    codec: Codec, relative: Sequence[tuple[Floats, Reference | None] | None], importance: Floats
) -> list[Tiers | None]:
    """Tier ids of every head of a block; None: an exact record."""
    if codec.allocate in ("budget", "layer"):
        costs = [
            tier_costs(codec, head[0], weight) if head else None
            for head, weight in zip(relative, importance, strict=True)
        ]
        if codec.allocate == "layer":
            return choose_pooled(codec.budget_columns, costs)
        return [choose_pooled(codec.budget_columns, [cost])[0] for cost in costs]
    return [
        choose_tiers(codec, head[0], weight) if head else None
        for head, weight in zip(relative, importance, strict=True)
    ]


def _exact_record(codec: Codec, k: Array, v: Array) -> bytes:
    tokens, dim = k.shape
    header = Header(
        exact=True,
        dtype=codec.dtype,
        value_bits=0,
        head_dim=dim,
        tokens=tokens,
        key_group=0,
        value_group=0,
        key_metadata=METADATA[0],
        value_metadata=METADATA[0],
        key_reference=False,
        value_rotation=False,
        value_fold=0,
        nbytes=exact_nbytes(tokens, dim, codec.dtype),
        key_fold=(0, 0, 0, 0),
        tiers=(TIER_EXACT,) * dim,
    )
    return (header.pack().ljust(64, b"\0") + k.tobytes() + v.tobytes()).ljust(header.nbytes, b"\0")


def _reference(x: Floats) -> Reference | None:
    with np.errstate(all="ignore"):
        mean = (eight_sum(x) / F32(len(x))).astype(np.float16)
    return mean if np.isfinite(mean).all() else None


def _code_keys(codec: Codec, x: Floats, tiers: Array) -> dict[int, Coded]:
    """Coded groups of every used tier; codes [key_group, groups, channels]."""
    groups = x.reshape(-1, codec.key_group, codec.head_dim).swapaxes(0, 1)
    return {
        tier: code_groups(groups[:, :, tiers == tier], TIER_BITS[tier], codec.key_range, codec.key_metadata)
        for tier in STORED_TIERS
        if (tiers == tier).any()
    }


def _code_values(codec: Codec, y: Floats) -> list[Coded]:
    """Coded value groups, codes [channels of the group, T]."""
    if codec.value_rotation:
        with np.errstate(all="ignore"):
            y = hadamard(y)
    runs = [y[:, low : low + codec.value_group].T for low in range(0, codec.head_dim, codec.value_group)]
    return [code_groups(run, codec.value_bits, codec.value_range, codec.value_metadata) for run in runs]


def _fold(parts: list[Coded]) -> int:
    """Upper 16 bits of the largest scale's float32, rounded up."""
    if not parts:
        return 0
    largest = np.max([part.scale.max() for part in parts]).astype(F32)
    return (int(largest.view(np.uint32)) + 0xFFFF) >> 16


def _coded_record(codec: Codec, x: Floats, k: Array, v: Array, tiers: Tiers) -> tuple[bytes, int] | None:
    """A coded record and its raised scales, or None where only an exact one can hold the block."""
    y = widen(v, codec.dtype)
    if not np.isfinite(y).all():
        return None
    keys = _code_keys(codec, x, tiers)
    values = _code_values(codec, y) if codec.value_bits else []
    parts = [*keys.values(), *values]
    if not all(part.fits.all() for part in parts):
        return None
    raised = sum(int(part.raised.sum()) for part in parts)
    return _assemble(codec, tiers, keys, values, k, v), raised


def _assemble(codec: Codec, tiers: Array, keys: dict[int, Coded], values: list[Coded], k: Array, v: Array) -> bytes:
    """Every section of section 3 in its place."""
    counts = tuple(int((tiers == tier).sum()) for tier in range(6))
    sections = codec_sections(codec, counts)
    header = Header(
        exact=False,
        dtype=codec.dtype,
        value_bits=codec.value_bits,
        head_dim=codec.head_dim,
        tokens=len(k),
        key_group=codec.key_group,
        value_group=codec.value_group if codec.value_bits else 0,
        key_metadata=codec.key_metadata,
        value_metadata=codec.value_metadata if codec.value_bits else METADATA[0],
        key_reference=codec.key_reference,
        value_rotation=codec.value_rotation and codec.value_bits > 0,
        value_fold=_fold(values),
        nbytes=sections.nbytes,
        key_fold=tuple(_fold([keys[tier]] if tier in keys else []) for tier in (3, 2, 1, 0)),
        tiers=tuple(int(tier) for tier in tiers),
    )
    codes = {tier: part.codes.transpose(2, 1, 0).reshape(-1, len(k)) for tier, part in keys.items()}
    value_bytes = v.tobytes()
    if values:
        value_bytes = _value_rows(np.concatenate([part.codes for part in values]).T, codec.value_bits)
    record = bytearray(sections.nbytes)
    for at, data in (
        (0, header.pack() + pack_map(header.tiers)),
        (sections.key_metadata, _planes(list(keys.values()), axis=1)),
        (sections.value_metadata, _planes(values, axis=0)),
        (sections.columns, _key_columns(codes, len(k))),
        (sections.exact_keys, np.ascontiguousarray(k[:, tiers == TIER_EXACT].T).tobytes()),
        (sections.values, value_bytes),
    ):
        record[at : at + len(data)] = data
    return bytes(record)


def _planes(parts: list[Coded], axis: int) -> bytes:
    """Scales, then offsets: keys [groups, channels] joined on channels, value groups [T] one after the other."""
    if not parts:
        return b""
    planes = ([part.raw_scale for part in parts], [part.raw_offset for part in parts])
    return b"".join(np.concatenate(plane, axis=axis).tobytes() for plane in planes)


def _key_columns(codes: dict[int, Array], tokens: int) -> bytes:
    """The columns of section 3.2 from the codes per tier id, [channels, T]."""
    n1, n2, n3, n4, n8 = (codes.get(tier, np.zeros((0, tokens), np.uint8)) for tier in range(5))
    two, one = np.concatenate([n3 & 3, n2]), np.concatenate([n3 >> 2, n1])
    return b"".join(to_words(entries, bits).tobytes() for entries, bits in ((n8, 8), (n4, 4), (two, 2), (one, 1)))


def _value_rows(codes: Array, bits: int) -> bytes:
    """The rows of section 3.4 from the codes [T, D]."""
    if bits == 3:
        return to_words(codes & 3, 2).tobytes() + to_words(codes >> 2, 1).tobytes()
    return to_words(codes, bits).tobytes()
