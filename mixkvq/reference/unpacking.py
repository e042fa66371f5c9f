"""From the bytes of a record to its keys and values (docs/format.md sections 2 and 3)."""

from __future__ import annotations

import numpy as np

from .coding import offset_of, values_of
from .layout import STORED_TIERS, coded_sections, from_words, parse, value_row_counts
from .numbers import F32, ITEM_BYTES, STORAGE, Array, Floats, hadamard, widen
from .tiers import TIER_BITS, TIER_EXACT


def unpack(record: bytes, mu: Array | None = None) -> tuple[Floats, Floats]:
    """Keys and values of a record.

    Parameters
    ----------
    record : bytes
    mu : ndarray, float16, [D], optional
        Needed when the record is coded against a reference.

    Returns
    -------
    k, v : ndarray, float32, [T, D]
        Not rounded to the model's dtype.

    Raises
    ------
    ValueError
        As `parse`; or if ``mu`` is needed and missing.
    """
    h = parse(record)
    item, kind = ITEM_BYTES[h.dtype], STORAGE[h.dtype]

    def exact(at: int, rows: int, columns: int) -> Floats:
        return widen(np.frombuffer(record, kind, rows * columns, at).reshape(rows, columns), h.dtype)

    if h.exact:
        return exact(64, h.tokens, h.head_dim), exact(64 + h.tokens * h.head_dim * item, h.tokens, h.head_dim)
    if h.key_reference and mu is None:
        raise ValueError("mu is None, must be given: the record is coded against a reference")
    shape = h.counts, h.tokens, h.key_group, h.key_metadata, h.value_bits, h.value_group, h.value_metadata, h.dtype
    sections = coded_sections(*shape)
    tiers = np.array(h.tiers)
    k = np.empty((h.tokens, h.head_dim), F32)
    k[:, tiers == TIER_EXACT] = exact(sections.exact_keys, h.counts[5], h.tokens).T
    groups, coded = h.tokens // h.key_group, h.head_dim - h.counts[5]
    raw = _planes(record, sections.key_metadata, h.key_metadata, groups, coded)
    codes = _read_columns(record, sections.columns, h.counts, h.tokens)
    begin = 0
    for tier in STORED_TIERS:
        part = slice(begin, begin + h.counts[tier])
        begin = part.stop
        scale, offset = offset_of(raw[0][:, part], raw[1][:, part], TIER_BITS[tier])
        x = values_of(codes[tier].T, scale.repeat(h.key_group, 0), offset.repeat(h.key_group, 0))
        if h.key_reference and mu is not None:
            x = x + mu.view(np.float16).astype(F32)[tiers == tier]
        k[:, tiers == tier] = x
    if not h.value_bits:
        return k, exact(sections.values, h.tokens, h.head_dim)
    raw = _planes(record, sections.value_metadata, h.value_metadata, -(-h.head_dim // h.value_group), h.tokens)
    scale, offset = offset_of(raw[0], raw[1], h.value_bits)
    widths = np.minimum(h.value_group, h.head_dim - np.arange(0, h.head_dim, h.value_group))
    vcodes = _read_rows(record, sections.values, h.value_bits, h.tokens, h.head_dim)
    v = values_of(vcodes, scale.repeat(widths, 0).T, offset.repeat(widths, 0).T)
    return k, hadamard(v) if h.value_rotation else v


def _planes(record: bytes, at: int, metadata: str, rows: int, columns: int) -> tuple[Array, Array]:
    kinds = ("u1", "i1") if metadata == "e5m3" else ("<f2", "<f2")
    item = np.dtype(kinds[0]).itemsize
    size = rows * columns
    scale = np.frombuffer(record, kinds[0], size, at)
    offset = np.frombuffer(record, kinds[1], size, at + size * item)
    return scale.reshape(rows, columns), offset.reshape(rows, columns)


def _read_planes(record: bytes, at: int, entries: tuple[int, int, int, int], lanes: int) -> list[Array]:
    """Array of the 8-, 4-, two- and one-bit words that follow each other from byte ``at``, [entries, lanes] each."""
    planes = []
    for bits, count in zip((8, 4, 2, 1), entries, strict=True):
        rows = -(-count * bits // 32)
        words = np.frombuffer(record, "<u4", rows * lanes, at).reshape(rows, lanes)
        planes.append(from_words(words, bits, count))
        at += 4 * rows * lanes
    return planes


def _read_columns(record: bytes, at: int, counts: tuple[int, ...], tokens: int) -> dict[int, Array]:
    n1, n2, n3, n4, n8, _ = counts
    eight, four, two, one = _read_planes(record, at, (n8, n4, n3 + n2, n3 + n1), tokens)
    return {4: eight, 3: four, 2: two[:n3] | one[:n3] << 2, 1: two[n3:], 0: one[n3:]}


def _read_rows(record: bytes, at: int, bits: int, tokens: int, head_dim: int) -> Array:
    used = tuple(tokens if rows else 0 for rows in value_row_counts(bits, tokens))
    planes = [plane for plane in _read_planes(record, at, (used[0], used[1], used[2], used[3]), head_dim) if len(plane)]
    return planes[0] | planes[1] << 2 if bits == 3 else planes[0]
