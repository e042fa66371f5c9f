"""Salience statistics: the CUDA kernel on the emulator against the CPU core, bit for bit."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from core_cases import DTYPES, HEAD_DIMS, examples, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st

from mixkvq import arrays

pytestmark = emulator.NEEDED


def same(mine: np.ndarray, theirs: np.ndarray) -> bool:
    """Bit for bit; every NaN is the same."""
    return bool((np.isnan(mine) == np.isnan(theirs)).all() and (mine == theirs)[~np.isnan(mine)].all())


@examples(60)
@given(
    st.integers(0, 2**32),
    st.sampled_from(HEAD_DIMS),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
)
def test_sums_equal_the_core(seed, head_dim, kv_heads, group, power, dtype, tokens):
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 4))
    wide = rng.standard_normal((batch, kv_heads * group, tokens, head_dim))
    wide *= 10.0 ** rng.integers(-6, 4, (1, 1, 1, head_dim))
    q = strided(rng, narrowed(wide.astype(np.float32), dtype))
    first = rng.integers(0, tokens + 1, batch)
    expected = arrays.salience(q, kv_heads, power=power, first=first)
    got = emulator.salience(q, kv_heads, power=power, first=first)
    assert same(got, expected)
    assert same(emulator.salience(q, kv_heads, power=power, first=first, sum=got),
                arrays.salience(q, kv_heads, power=power, first=first, sum=expected))  # fmt: skip
    assert same(emulator.salience(q, kv_heads, power=power), arrays.salience(q, kv_heads, power=power))


@pytest.mark.parametrize("power", [1, 2])
def test_what_is_not_a_number(power):
    q = np.ones((1, 2, 3, 8), np.float32)
    q[0, 0, 0, :4] = np.nan, np.inf, -np.inf, -0.0
    got = emulator.salience(q, 1, power=power)
    assert same(got, arrays.salience(q, 1, power=power))
    assert np.isnan(got[0, 0, 0]) and np.isinf(got[0, 0, 1:3]).all()


def test_the_sum_is_in_token_then_head_order():
    q = np.ones((1, 2, 40, 8), np.float32)
    q[0, 0, 0] = 2**27
    assert (emulator.salience(q, 1, power=2) == 2.0**54).all()  # which swallows the ones one by one
    q[0, 0, 0], q[0, 1, 39] = 1, 2**27
    assert (emulator.salience(q, 1, power=2) == 2.0**54 + 80).all()


def test_no_queries_change_nothing():
    total = np.arange(16.0).reshape(1, 2, 8)
    for q in (np.zeros((1, 4, 0, 8), np.float32), np.zeros((0, 4, 3, 8), np.float32)):
        assert (emulator.salience(q, 2, power=1, sum=total[: q.shape[0]]) == total[: q.shape[0]]).all()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="power is 3, must be 1 or 2"):
        emulator.salience(np.zeros((1, 4, 1, 8), np.float32), 2, power=3)
    with pytest.raises(ValueError, match="kv_heads is 3, must be a divisor"):
        emulator.salience(np.zeros((1, 4, 1, 8), np.float32), 3, power=1)
