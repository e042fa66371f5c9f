"""The oracle's number formats and placement of bits, against facts worked out by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from inputs import codec_of

from mixkvq import reference
from mixkvq.reference import layout, numbers

F32 = np.float32


def test_e5m3_has_the_stated_values_and_range():
    assert numbers.E5M3[0] == 2.0**-24
    assert numbers.E5M3[255] == 240
    assert numbers.E5M3[8 * 24] == 1
    assert numbers.E5M3[8 * 25 + 3] == 2.75
    assert (np.diff(numbers.E5M3) > 0).all()


@pytest.mark.parametrize(
    ("x", "byte"),
    [
        (0.0, 0),
        (2.0**-30, 0),
        (1.0, 192),
        (1.0625, 192),  # between m = 0 and m = 1: the even one
        (1.1875, 194),  # between m = 1 and m = 2
        (np.nextafter(F32(1.0625), F32(2)), 193),
        (1.9375, 200),  # between 1.875 and 2: m = 0 of the next exponent
        (240.0, 255),
        (232.0, 254),  # between 224 (m = 6) and 240 (m = 7)
    ],
)
def test_e5m3_rounds_to_nearest_with_ties_to_even_mantissa(x, byte):
    assert numbers.e5m3_nearest(np.array([x], F32))[0] == byte


def test_e5m3_returns_every_stored_value():
    assert (numbers.e5m3_nearest(numbers.E5M3) == np.arange(256)).all()


def test_eight_sum_adds_in_the_written_order():
    big = F32(2.0**24)
    x = np.zeros((16, 1), F32)
    x[0], x[8], x[4], x[1] = big, 1, -big, 3  # s0 = 2^24 + 1 rounds to 2^24; s0 + s4 = 0; then + 3
    assert numbers.eight_sum(x)[0] == 3
    x[:] = 0
    x[0], x[1], x[8] = big, 1, 1  # both ones are lost, one after the other
    assert numbers.eight_sum(x)[0] == big
    x[:] = 0
    x[0], x[1], x[9] = big, 1, 1  # s1 = 2 survives
    assert numbers.eight_sum(x)[0] == big + 2


@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 112, 128, 192, 256])
def test_hadamard_is_orthonormal_and_block_diagonal(dim):
    matrix = numbers.hadamard(np.eye(dim, dtype=F32)).astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(dim)).max() < 1e-6
    run = dim & -dim
    expected = np.zeros((dim, dim))
    for i in range(dim):
        for j in range(dim):
            if i // run == j // run:
                expected[i, j] = (-1) ** ((i % run & j % run).bit_count()) * F32(run**-0.5)
    assert (matrix == expected).all()


def test_bfloat16_widening_and_narrowing():
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    assert numbers.widen(bits, "bfloat16").tolist() == [1.0, -2.0, np.inf, 2.0**-133]
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32).view(F32)
    assert numbers.narrow(ties, "bfloat16").tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]


def test_storage_refuses_another_dtype():
    with pytest.raises(TypeError, match="float64"):
        numbers.widen(np.zeros(3), "float32")


def test_one_bit_entries_lie_in_nibbles():
    # entries 0-3 in the low nibble of byte 0, 4-7 of byte 1, ..., 16-19 in the high nibble of byte 0
    assert [layout.bit_position(i, 1) for i in (0, 3, 4, 15, 16, 19, 20, 31)] == [0, 3, 8, 27, 4, 7, 12, 31]
    assert sorted(layout.bit_position(i, 1) for i in range(32)) == list(range(32))


def test_one_bit_word_lies_under_the_two_bit_words():
    """Byte k: its low nibble holds the entries of byte k of the even two-bit word, its high nibble the odd one's."""
    for entry in range(32):
        one = layout.bit_position(entry, 1)
        two = layout.bit_position(entry % 16, 2)
        assert one // 8 == two // 8
        assert one % 8 // 4 == entry // 16
        assert one % 4 == two % 8 // 2


def test_words_put_entry_zero_lowest():
    codes = np.zeros((9, 2), np.uint8)
    codes[0, 0], codes[7, 0], codes[8, 0], codes[1, 1] = 5, 15, 3, 2
    assert layout.to_words(codes, 4).tolist() == [[0xF0000005, 0x20], [3, 0]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_words_round_trip(bits):
    codes = (np.arange(77 * 3).reshape(77, 3) * 37 % 2**bits).astype(np.uint8)
    assert (layout.from_words(layout.to_words(codes, bits), bits, 77) == codes).all()


def test_channel_map_is_three_bits_least_significant_first():
    assert layout.pack_map((1, 2, 3, 0, 0, 0, 0, 5)) == (1 | 2 << 3 | 3 << 6 | 5 << 21).to_bytes(3, "little")
    ids = tuple(i % 6 for i in range(80))
    assert layout.unpack_map(layout.pack_map(ids)) == ids


def test_three_bit_key_column_bits_by_hand():
    """Eight 3-bit channels whose codes are known: low bits in a two-bit column, bit 2 in a one-bit column."""
    codec = codec_of(
        8,
        key_patterns=({3: 64},),
        block_length=32,
        residual_length=32,
        key_group_size=32,
        key_range="minmax",
        key_reference="none",
        value_bits=16,
    )
    k = (np.arange(32)[:, None] % 8 + np.zeros(8)).astype(F32)  # range 7, step 1: the code is t mod 8
    record, mu, raised = reference.pack_block(codec, k, np.zeros((32, 8), F32))
    assert mu is None
    assert raised == 0
    columns = layout.codec_sections(codec, (0, 0, 8, 0, 0, 0)).columns
    words = struct.unpack_from("<64I", record, columns)
    for t in range(32):
        assert words[t] == 0x5555 * (t % 8 & 3)
        assert words[32 + t] == (0x0F0F if t % 8 >= 4 else 0)


def test_header_bytes_by_hand():
    codec = codec_of(
        8,
        key_patterns=({4: 64},),
        block_length=64,
        residual_length=64,
        key_group_size=32,
        key_range="minmax",
        value_bits=2,
        key_metadata="fp16",
    )
    k = np.tile(np.arange(64, dtype=F32)[:, None] % 16, (1, 8))
    record, mu, _ = reference.pack_block(codec, k, np.zeros((64, 8), F32))
    assert mu.tolist() == [7.5] * 8
    # kind 0, float32, 2-bit values, D 8, T 64, groups 32 and 8, keys fp16, values e5m3, reference and rotation
    # and the smallest value scale, 2^-24 = 0x33800000
    assert record[:20] == b"MKVQ" + bytes([1, 0, 1, 2]) + struct.pack("<4HBBH", 8, 64, 32, 8, 1, 3, 0x3380)
    nbytes, four, three, two, one = struct.unpack_from("<I4H", record, 20)
    assert (nbytes, four, three, two, one) == (len(record), 0x3F80, 0, 0, 0)  # key scale 1.0
    assert record[32:35] == bytes([0b11011011, 0b10110110, 0b01101101])
    assert (reference.unpack(record, mu)[0] == k).all()
