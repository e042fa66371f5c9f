"""Salience statistics: the C core against the oracle, bit for bit, however the queries are cut into calls."""

from __future__ import annotations

import numpy as np
import pytest
from core_cases import DTYPES, HEAD_DIMS, examples, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st

from mixkvq import reference

pytest_plugins = ["core_fixtures"]


@examples(80)
@given(
    st.integers(0, 2**32),
    st.sampled_from(HEAD_DIMS),
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
)
def test_sums_equal_the_oracle(isa, seed, head_dim, kv_heads, group, power, dtype, tokens):
    from mixkvq import arrays

    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 4))
    shape = (batch, kv_heads * group, tokens, head_dim)
    wide = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, (1, 1, 1, head_dim))
    q = strided(rng, narrowed(wide.astype(np.float32), dtype))
    first = rng.integers(0, tokens + 1, batch)
    got = arrays.salience(q, kv_heads, power=power, first=first)  # uint16 holds bfloat16
    for b in range(batch):
        expected = reference.salience(q[b], kv_heads, power, int(first[b]), dtype=dtype)
        assert (got[b].view(np.uint64) == expected.view(np.uint64)).all()


@pytest.mark.parametrize("power", [1, 2])
def test_cutting_a_sequence_changes_nothing(isa, power):
    from mixkvq import arrays

    q = np.random.default_rng(power).standard_normal((2, 6, 50, 24)).astype(np.float32)
    whole = arrays.salience(q, 2, power=power, first=np.array([7, 0]))
    total = arrays.salience(q[:, :, :20], 2, power=power, first=np.array([7, 0]))
    for part in (q[:, :, 20:21], q[:, :, 21:50]):
        total = arrays.salience(part, 2, power=power, sum=total)
    assert (total == whole).all()


def test_the_sum_is_in_token_then_head_order(isa):
    """1e16 first swallows the ones one by one; any other order would let them add up."""
    from mixkvq import arrays

    q = np.ones((1, 2, 4, 8), np.float32)
    q[0, 0, 0] = 2**27
    expected = 2.0**54  # 2^54 + 1 is not a float64, and neither is any later single step
    assert (arrays.salience(q, 1, power=2) == expected).all()
    q[0, 0, 0], q[0, 1, 3] = 1, 2**27
    assert (arrays.salience(q, 1, power=2) == 2.0**54 + 8).all()  # seven ones first, then rounded to a multiple of 4
