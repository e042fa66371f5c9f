"""Where things lie in a record (docs/format.md sections 1, 3 and 6): header, channel map, code words, sizes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .codec import Codec
from .numbers import ITEM_BYTES, Array, up64

MAGIC = b"MKVQ"
VERSION = 1
DTYPES = {1: "float32", 2: "float16", 3: "bfloat16"}
METADATA = ("e5m3", "fp16")
STORED_TIERS = (4, 3, 2, 1, 0)
"""Coded tier ids in stored order: 8, 4, 3, 2, 1 bits."""
HEADER = struct.Struct("<4sBBBBHHHHBBHI4H")


@dataclass(frozen=True)
class Header:
    """The fields of a record's header, plus the tier id of every channel (all 5 in an exact record)."""

    exact: bool
    dtype: str
    value_bits: int
    """0: exact values"""
    head_dim: int
    tokens: int
    key_group: int
    value_group: int
    key_metadata: str
    value_metadata: str
    key_reference: bool
    value_rotation: bool
    value_fold: int
    nbytes: int
    key_fold: tuple[int, ...]
    """of the 4-, 3-, 2- and 1-bit tier"""
    tiers: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Channels per tier id."""
        return tuple(self.tiers.count(tier) for tier in range(6))

    def pack(self) -> bytes:
        """The 32 bytes of section 1, without the channel map."""
        kinds = METADATA.index(self.key_metadata) | METADATA.index(self.value_metadata) << 4
        dtype = next(code for code, name in DTYPES.items() if name == self.dtype)
        return HEADER.pack(
            MAGIC,
            VERSION,
            int(self.exact),
            dtype,
            self.value_bits,
            self.head_dim,
            self.tokens,
            self.key_group,
            self.value_group,
            kinds,
            self.key_reference | self.value_rotation << 1,
            self.value_fold,
            self.nbytes,
            *self.key_fold,
        )


@dataclass(frozen=True)
class Sections:
    """Byte offset of every section of a coded record, and its length."""

    key_metadata: int
    value_metadata: int
    columns: int
    exact_keys: int
    values: int
    nbytes: int


def column_counts(counts: tuple[int, ...]) -> tuple[int, int, int, int]:
    """u32 columns of 8-, 4-, two- and one-bit entries that hold these channels per tier id."""
    n1, n2, n3, n4, n8, _ = counts
    return -(-n8 // 4), -(-n4 // 8), -(-(n3 + n2) // 16), -(-(n3 + n1) // 32)


def value_row_counts(bits: int, tokens: int) -> tuple[int, int, int, int]:
    """u32 rows of 8-, 4-, two- and one-bit entries that hold the value codes of a block."""
    return (
        tokens // 4 if bits == 8 else 0,
        tokens // 8 if bits == 4 else 0,
        tokens // 16 if bits in (2, 3) else 0,
        tokens // 32 if bits in (1, 3) else 0,
    )


def coded_sections(
    counts: tuple[int, ...],
    tokens: int,
    key_group: int,
    key_metadata: str,
    value_bits: int,
    value_group: int,
    value_metadata: str,
    dtype: str,
) -> Sections:
    """Sections of a coded record with these channels per tier id."""
    dim, item = sum(counts), ITEM_BYTES[dtype]
    keys = up64(32 + 3 * dim // 8)
    values = keys + 2 * (METADATA.index(key_metadata) + 1) * (tokens // key_group) * (dim - counts[5])
    end = values
    if value_bits:
        end += 2 * (METADATA.index(value_metadata) + 1) * tokens * -(-dim // value_group)
    columns = up64(end)
    exact_keys = columns + 4 * tokens * sum(column_counts(counts))
    rows = exact_keys + counts[5] * tokens * item
    value_bytes = 4 * dim * sum(value_row_counts(value_bits, tokens)) if value_bits else tokens * dim * item
    return Sections(keys, values, columns, exact_keys, rows, up64(rows + value_bytes))


def exact_nbytes(tokens: int, head_dim: int, dtype: str) -> int:
    """Length of an exact record."""
    return up64(64 + 2 * tokens * head_dim * ITEM_BYTES[dtype])


def codec_sections(codec: Codec, counts: tuple[int, ...]) -> Sections:
    """`coded_sections` of a codec's coded records."""
    return coded_sections(
        counts,
        codec.block_length,
        codec.key_group,
        codec.key_metadata,
        codec.value_bits,
        codec.value_group,
        codec.value_metadata,
        codec.dtype,
    )


def record_nbytes(codec: Codec, counts: tuple[int, ...] | None = None) -> int:
    """Length of a record of ``codec``: coded with ``counts`` channels per tier id, or exact when there are none."""
    if counts is None:
        return exact_nbytes(codec.block_length, codec.head_dim, codec.dtype)
    return codec_sections(codec, counts).nbytes


def pack_map(tiers: tuple[int, ...]) -> bytes:
    """Three bits per channel, channel 0 lowest."""
    number = sum(tier << 3 * channel for channel, tier in enumerate(tiers))
    return number.to_bytes(3 * len(tiers) // 8, "little")


def unpack_map(data: bytes) -> tuple[int, ...]:
    """Inverse of `pack_map`."""
    number = int.from_bytes(data, "little")
    return tuple(number >> 3 * channel & 7 for channel in range(len(data) * 8 // 3))


def bit_position(entry: int, bits: int) -> int:
    """Lowest bit of an entry in its u32 word; one-bit entries follow the nibble rule of section 3.2."""
    if bits > 1:
        return bits * entry
    return 8 * (entry % 16 // 4) + 4 * (entry // 16) + entry % 4


def to_words(codes: Array, bits: int) -> Array:
    """Entries, uint8 [entries, lanes], as words, uint32 [ceil(entries * bits / 32), lanes]; unused entries are zero."""
    per_word = 32 // bits
    words = np.zeros((-(-len(codes) // per_word), codes.shape[1]), "<u4")
    for index, row in enumerate(codes):
        words[index // per_word] |= row.astype(np.uint32) << np.uint32(bit_position(index % per_word, bits))
    return words


def from_words(words: Array, bits: int, entries: int) -> Array:
    """Inverse of `to_words`."""
    per_word = 32 // bits
    shifts = np.array([bit_position(index % per_word, bits) for index in range(entries)], np.uint32)
    picked = words[np.arange(entries) // per_word] if entries else words[:0]
    return ((picked >> shifts[:, None]) & np.uint32(2**bits - 1)).astype(np.uint8)


def parse(record: bytes) -> Header:
    """Read and check a header and its channel map.

    Raises
    ------
    ValueError
        For another magic or version, a field outside its set, or fields that contradict each other or the length.
    """
    if len(record) < 64:
        raise ValueError(f"record has {len(record)} bytes, must have at least 64")
    magic, version, kind, dtype, bits, dim, tokens, *rest = HEADER.unpack_from(record)
    kg, vg, kinds, flags, vfold, nbytes, *kfold = rest
    _demand(magic == MAGIC, "magic", magic, repr(MAGIC))
    _demand(version == VERSION, "version", version, str(VERSION))
    _demand(kind in (0, 1), "kind", kind, "0 or 1")
    _demand(dtype in DTYPES, "dtype", dtype, "1, 2 or 3")
    _demand(dim % 8 == 0 and 8 <= dim <= 256, "head_dim", dim, "a multiple of 8 from 8 to 256")
    _demand(tokens >= 1, "tokens", tokens, "at least 1")
    _demand(nbytes <= len(record), "nbytes", nbytes, f"at most the {len(record)} bytes given")
    if kind == 1:
        for name, value in (("value_bits", bits), ("key_group", kg), ("value_group", vg), ("metadata", kinds)):
            _demand(value == 0, name, value, "0 in an exact record")
        _demand(flags == 0, "flags", flags, "0 in an exact record")
        expected = exact_nbytes(tokens, dim, DTYPES[dtype])
        tiers: tuple[int, ...] = (5,) * dim
    else:
        _demand(tokens % 32 == 0 and tokens <= 1024, "tokens", tokens, "a multiple of 32 up to 1024")
        _demand(kg > 0 and kg % 8 == 0 and tokens % kg == 0, "key_group", kg, "a multiple of 8 that divides tokens")
        _demand(bits in (0, 1, 2, 3, 4, 8), "value_bits", bits, "0, 1, 2, 3, 4 or 8")
        fine = vg > 0 and vg % 8 == 0 and vg <= dim if bits else vg == 0
        _demand(fine, "value_group", vg, "a multiple of 8 up to head_dim, 0 for exact values")
        _demand(kinds & 15 < 2 and kinds >> 4 < 2, "metadata", kinds, "0 or 1 in both nibbles")
        _demand(flags < 4, "flags", flags, "0 to 3")
        tiers = unpack_map(record[32 : 32 + 3 * dim // 8])
        _demand(max(tiers) <= 5, "channel map", max(tiers), "tier ids up to 5")
        counts = tuple(tiers.count(tier) for tier in range(6))
        names = METADATA[kinds & 15], METADATA[kinds >> 4]
        expected = coded_sections(counts, tokens, kg, names[0], bits, vg, names[1], DTYPES[dtype]).nbytes
    _demand(nbytes == expected, "nbytes", nbytes, f"{expected} by the other fields")
    return Header(
        exact=kind == 1,
        dtype=DTYPES[dtype],
        value_bits=bits,
        head_dim=dim,
        tokens=tokens,
        key_group=kg,
        value_group=vg,
        key_metadata=METADATA[kinds & 15],
        value_metadata=METADATA[kinds >> 4],
        key_reference=bool(flags & 1),
        value_rotation=bool(flags & 2),
        value_fold=vfold,
        nbytes=nbytes,
        key_fold=tuple(kfold),
        tiers=tiers,
    )


def _demand(fine: bool, name: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"record: {name} is {value!r}, must be {allowed}")
