"""Unpacking: the CUDA kernel on the emulator against the CPU core, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib

import emulator
import numpy as np
import pytest
from core_cases import DTYPES, TROUBLES, codecs, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st
from inputs import codec_of, ramp
from test_golden import FACTS, NAMES, stored

from mixkvq import arrays, list_presets
from mixkvq.config import BlockCodec, MixKVQConfig

pytestmark = emulator.NEEDED


def same(mine: np.ndarray, theirs: np.ndarray, dtype: str) -> bool:
    """Bit for bit; every NaN is the same."""
    mine, theirs = np.ascontiguousarray(mine), np.ascontiguousarray(theirs)
    if dtype == "bfloat16":
        mine, theirs = ((x.astype(np.uint32) << 16).view(np.float32) for x in (mine, theirs))
    nan, integer = np.isnan(theirs), f"u{theirs.itemsize}"
    return bool((np.isnan(mine) == nan).all() and (mine.view(integer) == theirs.view(integer))[~nan].all())


def check(codec: BlockCodec, k: np.ndarray, v: np.ndarray, dtypes: tuple[str, ...] = DTYPES, **fields) -> None:
    packed = arrays.pack(codec, k, v, **fields)
    for b, row in enumerate(packed.records):
        for h, head in enumerate(row):
            mu = packed.mu[b, h] if packed.mu is not None else None
            for record in head:
                for dtype in dtypes:
                    expected = arrays.unpack(record, mu=mu, dtype=dtype)
                    for mine, theirs in zip(emulator.unpack(record, mu=mu, dtype=dtype), expected, strict=True):
                        assert same(mine, theirs, dtype)


@examples(40)
@given(
    st.integers(0, 2**32),
    codecs(head_dims=(8, 16, 24, 80), lengths=(32, 64, 96)),
    st.lists(st.sampled_from(TROUBLES), max_size=3),
    st.integers(0, 3).map(lambda n: n == 0),
)
def test_tokens_are_those_of_the_core(seed, codec, troubles, poison):
    rng = np.random.default_rng(seed)
    shape = (1, 1, codec.block_length, codec.head_dim)
    k, v = (fill(rng, shape, troubles, axis) for axis in (2, int(rng.integers(2, 4))))
    if poison:
        v[tuple(rng.integers(size) for size in shape)] = rng.choice([np.nan, np.inf, -np.inf])
    check(codec, narrowed(k, codec.dtype), narrowed(v, codec.dtype), (DTYPES[seed % 3],))


@pytest.mark.parametrize("head_dim", [64, 96, 112, 128, 192, 256])
def test_presets_at_every_head_dim(head_dim):
    for i, preset in enumerate(list_presets()):
        codec = codec_of(head_dim, DTYPES[i % 3], preset)
        x = narrowed(ramp(codec.block_length, 2 * head_dim)[None, None], codec.dtype)
        check(codec, x[..., :head_dim], x[..., head_dim:], (DTYPES[head_dim // 16 % 3],))


@pytest.mark.parametrize("length", [256, 1024])
def test_long_blocks(length):
    codec = codec_of(16, block_length=length, residual_length=length, key_group_size=32)
    codec = dataclasses.replace(codec, patterns=((2, 4, 3, 3, 2, 2),))
    check(codec, ramp(length, 16)[None, None], ramp(length, 16, 1)[None, None], ("float16",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", range(4))
def test_rows_blocks_and_strides(dtype, style):
    """Rows of different lengths, from different tokens on, into views of any strides; nothing else is written."""
    codec = codec_of(24, "float16", block_length=32, residual_length=32, key_group_size=32, key_range="minmax")
    x = narrowed(ramp(3 * 110, 96).reshape(3, 110, 2, 48).transpose(0, 2, 1, 3), "float16")
    packed = arrays.pack(codec, x[..., :24], x[..., 24:], first=[3, 2, 7], blocks=[1, 0, 3])
    rng = np.random.default_rng(0)
    while True:  # until it is this style
        blank = np.full((3, 2, 100, 24), 7, arrays._NUMPY[dtype])
        state = rng.bit_generator.state
        if rng.integers(4) == style:
            rng.bit_generator.state = state
            break
    k = strided(rng, blank)
    rng.bit_generator.state = state
    v = strided(rng, blank.copy())
    held = emulator.Packed(packed.records, 24, mu=packed.mu, capacity=5)
    emulator.unpack_into(held, k, v, [5, 1, 2])
    expected = [blank.copy(), blank.copy()]
    for b, (row, first) in enumerate(zip(packed.records, (5, 1, 2), strict=True)):
        for h, head in enumerate(row):
            for j, record in enumerate(head):
                part = slice(first + 32 * j, first + 32 * j + 32)
                assert packed.mu is not None
                for whole, tokens in zip(expected, arrays.unpack(record, mu=packed.mu[b, h], dtype=dtype), strict=True):
                    whole[b, h, part] = tokens
    assert (k == expected[0]).all() and (v == expected[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_payloads_of_exact_values_survive(dtype):
    """Every bit pattern, where the dtypes agree; into contiguous rows and into others."""
    codec = MixKVQConfig.preset("lossless", block_length=37, residual_length=37).codec(24, dtype)
    bits = np.random.default_rng(3).integers(0, 2**32, (1, 1, 37, 48), np.uint32)
    x = bits.view(np.float32) if dtype == "float32" else bits.astype(np.uint16).view(arrays._NUMPY[dtype])
    packed = arrays.pack(codec, x[..., :24], x[..., 24:])
    integer = f"u{x.itemsize}"
    for step in (1, 2):
        wide = np.zeros((2, 1, 1, 37, 24 * step), x.dtype)
        k, v = wide[..., ::step]
        emulator.unpack_into(emulator.Packed(packed.records, 24), k, v, [0])
        got = np.concatenate([k, v], axis=-1)
        assert (np.ascontiguousarray(got).view(integer) == np.ascontiguousarray(x).view(integer)).all()


@pytest.mark.parametrize("name", NAMES)
def test_golden_values(name):
    pairs = [(record, mu) for head, mu in zip(*stored(name), strict=True) for record in head]
    parts = [x.tobytes() for record, mu in pairs for x in emulator.unpack(record, mu=mu)]
    assert hashlib.sha256(b"".join(parts)).hexdigest() == FACTS[name]["unpacked"]


def test_no_records_and_arguments_that_are_refused():
    k = np.ones((1, 2, 4, 16), np.float32)
    emulator.unpack_into(emulator.Packed([[[], []]], 16), k, k, [0])
    assert (k == 1).all()
    with pytest.raises(ValueError, match="k is 2, must be of the history's heads"):
        emulator.unpack_into(emulator.Packed([[[]]], 16), k, k, [0])
