"""Attention over sinks, packed blocks and window: the C core against float64 attention on the unpacked values."""

from __future__ import annotations

import numpy as np
import pytest
from attend_cases import (
    BOUNDS,
    CASES,
    check,
    check_key_that_is_not_finite,
    check_large_scores,
    check_minus_infinity,
    check_query_that_sees_nothing,
    check_value_that_is_not_finite,
    plain,
    random_case,
)
from core_cases import DTYPES, HEAD_DIMS, examples
from hypothesis import given
from hypothesis import strategies as st

from mixkvq import reference
from mixkvq.config import BlockCodec, MixKVQConfig

pytest_plugins = ["core_fixtures"]


def random_attend(
    seed: int, codec: BlockCodec, heads: int, group: int, queries: int, mask_kind: str, blocks: int
) -> None:
    from mixkvq import arrays

    args, options = random_case(seed, codec, heads, group, queries, mask_kind, blocks)
    expected = reference.attend(*args, **options)
    for precision in BOUNDS:
        got = arrays.attend(*args, **options, precision=precision)
        assert got.shape == expected.shape
        assert got.dtype == np.float32
        check(got, expected, precision)


@examples(200)
@given(*CASES)
def test_attention_is_within_the_bound(isa, seed, codec, heads, group, queries, mask_kind, blocks):
    random_attend(seed, codec, heads, group, queries, mask_kind, blocks)


@examples(25)
@given(*CASES[:-1], st.sampled_from([9, 17, 40]))
def test_runs_of_blocks_are_merged(isa, seed, codec, heads, group, queries, mask_kind, blocks):
    """Rows of a batch have different numbers of blocks, some none in some runs."""
    random_attend(seed, codec, min(heads, 2), group, min(queries, 4), mask_kind, blocks)


@pytest.mark.slow
@examples(2000, fixed=False)
@given(*CASES)
def test_attention_is_within_the_bound_at_length(isa, seed, codec, heads, group, queries, mask_kind, blocks):
    random_attend(seed, codec, heads, group, queries, mask_kind, blocks)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", ["default", "compact", "near-lossless", "paper", "kivi-2", "kivi-4", "lossless"])
def test_presets_are_within_the_bound(isa, preset, head_dim):
    codec = MixKVQConfig.preset(preset).codec(head_dim, DTYPES[head_dim // 8 % 3])
    random_attend(head_dim, codec, 2, 4, 1, "causal", 6)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("value_bits", [1, 2, 3, 4, 8])
def test_every_number_of_query_rows(isa, group, value_bits):
    """Every kernel is compiled once per number of rows that share a pass."""
    config = MixKVQConfig.preset("default", value_bits=value_bits, residual_length=64, block_length=64)
    random_attend(value_bits, config.codec(80, "float32"), 2, group, 1, "none", 4)


@pytest.mark.parametrize("preset", ["default", "compact", "near-lossless", "paper", "kivi-2", "kivi-4"])
def test_large_logits_keep_to_what_is_promised(isa, preset):
    """Rounding errors of queries grow with the logits: 2e-3 up to a standard deviation of 16, "fast" 6e-2 up to 2."""
    from mixkvq import arrays

    rng = np.random.default_rng(1)
    codec, none = MixKVQConfig.preset(preset).codec(128, "float32"), np.zeros((1, 1, 0, 128), np.float32)
    for std in (1, 2, 16):
        k = (rng.standard_normal((256, 128)) * np.exp(0.7 * rng.standard_normal(128))).astype(np.float32)
        v = rng.standard_normal((256, 128)).astype(np.float32)
        q = rng.standard_normal((1, 4, 2, 128))
        q = (q * std / np.std(np.einsum("abcd,td->abct", q, k) * 128**-0.5)).astype(np.float32)
        records, mu, _ = reference.pack_head(codec, k, v, np.sqrt((q**2).mean((0, 1, 2))).astype(np.float32))
        mu = None if mu is None else mu[None, None]
        expected = reference.attend(q, [[records]], none, none, [0], mu=mu)
        for precision in ("default", "fast") if std <= 2 else ("default",):
            got = arrays.attend(q, [[records]], none, none, [0], mu=mu, precision=precision)
            error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            assert error.max() <= BOUNDS[precision]


def test_outlier_channels_are_within_the_default_bound(isa):
    """A channel with large keys and queries sets the scale of all 16-bit operands of its tier."""
    from mixkvq import arrays

    rng = np.random.default_rng(5)
    width = np.exp(rng.standard_normal(128))
    width[[3, 77]] *= 8
    k = (rng.standard_normal((256, 128)) * width / 2).astype(np.float32)
    v = rng.standard_normal((256, 128)).astype(np.float32)
    q = (rng.standard_normal((1, 4, 2, 128)) * np.exp(0.6 * rng.standard_normal(128))).astype(np.float32)
    none = np.zeros((1, 1, 0, 128), np.float32)
    for preset in ("default", "compact", "near-lossless", "kivi-2", "kivi-4"):
        codec = MixKVQConfig.preset(preset).codec(128, "float32")
        records, mu, _ = reference.pack_head(codec, k, v, np.sqrt((q**2).mean((0, 1, 2))).astype(np.float32))
        mu = None if mu is None else mu[None, None]
        expected = reference.attend(q, [[records]], none, none, [0], mu=mu)
        got = arrays.attend(q, [[records]], none, none, [0], mu=mu)
        assert (np.linalg.norm(got - expected, axis=-1) <= 2e-3 * np.linalg.norm(expected, axis=-1)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [5, 40, 70, 90])
def test_a_key_that_is_not_finite_reaches_the_queries_that_see_it(isa, value, token):
    from mixkvq import arrays

    check_key_that_is_not_finite(arrays.attend, value, token)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [5, 40, 70, 90])
def test_a_value_that_is_not_finite_stays_in_its_channel(isa, value, token):
    from mixkvq import arrays

    check_value_that_is_not_finite(arrays.attend, value, token)


def test_minus_infinity_in_a_key_hides_the_token(isa):
    from mixkvq import arrays

    check_minus_infinity(arrays.attend)


def test_large_scores_do_not_overflow(isa):
    from mixkvq import arrays

    check_large_scores(arrays.attend)


def test_a_query_that_sees_nothing_gives_zeros(isa):
    from mixkvq import arrays

    check_query_that_sees_nothing(arrays.attend)


def test_more_causal_queries_than_tokens(isa):
    from mixkvq import arrays

    _, k, v, _, rng = plain()
    q = rng.standard_normal((1, 1, 7, 16)).astype(np.float32)
    got = arrays.attend(q, [[[]]], k, v, [3], mask="causal", precision="exact")
    assert (got[0, 0, :4] == 0).all()
    assert (got[0, 0, 4] == v[0, 0, 0]).all()
    check(got, reference.attend(q, [[[]]], k, v, [3], mask="causal"))
