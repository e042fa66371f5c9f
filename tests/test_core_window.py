"""The exact window and reading back: append and unpack of ragged rows, through the layer handle."""

from __future__ import annotations

import numpy as np
import pytest
from core_cases import DTYPES, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st
from inputs import codec_of

from mixkvq import reference
from mixkvq.reference import numbers

pytest_plugins = ["core_fixtures"]


@examples(40)
@given(st.integers(0, 2**32), st.sampled_from([8, 24, 64]), st.integers(1, 3), st.sampled_from(DTYPES))
def test_unpack_writes_every_row_at_its_place_and_nothing_else(isa, seed, head_dim, heads, dtype):
    from mixkvq import arrays

    rng = np.random.default_rng(seed)
    codec = codec_of(head_dim, dtype, block_length=32, residual_length=32, key_group_size=32)
    blocks = rng.integers(0, 4, 3)
    source = fill(rng, (3, heads, 96, head_dim), [], 2)
    source[0, 0, 40, 1] = np.inf  # a second block that is exact in one head only
    k, v = narrowed(source, dtype), narrowed(source[..., ::-1], dtype)
    packed = arrays.pack(codec, k, v, blocks=blocks)
    first = rng.integers(0, 20, 3)
    shape = (3, heads, 96 + 20, head_dim)
    out = [strided(rng, np.full(shape, 77, numbers.STORAGE[dtype])) for _ in "kv"]
    window = np.zeros((3, heads, 0, head_dim), np.float32)
    arrays._layer(packed.records, window, window, [0, 0, 0], mu=packed.mu).unpack(*out, first.astype(np.int64))
    for b in range(3):
        for h in range(heads):
            parts = [reference.unpack(record, packed.mu[b, h]) for record in packed.records[b][h]]
            end = first[b] + 32 * blocks[b]
            for got, which in zip(out, (0, 1), strict=True):
                expected = np.full(shape[2:], 77, got.dtype)
                if parts:
                    expected[first[b] : end] = numbers.narrow(np.concatenate([part[which] for part in parts]), dtype)
                assert got[b, h].tobytes() == expected.tobytes()


@examples(40)
@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.integers(1, 9))
def test_append_copies_behind_each_row(isa, seed, dtype, tokens):
    from mixkvq import arrays

    rng = np.random.default_rng(seed)
    k, v = (strided(rng, narrowed(fill(rng, (2, 3, 30, 16), [], 2), dtype)) for _ in "kv")
    new = [strided(rng, narrowed(fill(rng, (2, 3, tokens, 16), [], 2), dtype)) for _ in "kv"]
    before = k.copy(), v.copy()
    exact = rng.integers(0, 30 - tokens + 1, 2)
    held = exact.copy()
    none = [[[] for _ in range(3)] for _ in range(2)]
    arrays._layer(none, k, v, held).append(*new)
    assert (held == exact + tokens).all()
    for buffer, old, added in zip((k, v), before, new, strict=True):
        for b in range(2):
            old[b, :, exact[b] : held[b]] = added[b]
        assert buffer.tobytes() == old.tobytes()


def test_append_refuses_what_does_not_fit_and_changes_nothing(isa):
    from mixkvq import arrays

    k, v = np.zeros((2, 1, 10, 8), np.float32), np.zeros((2, 1, 10, 8), np.float32)
    exact = np.array([3, 8])
    new = np.ones((2, 1, 3, 8), np.float32)
    with pytest.raises(ValueError, match="exact"):
        arrays._layer([[[]], [[]]], k, v, exact).append(new, new)
    assert exact.tolist() == [3, 8]
    assert not k.any()
