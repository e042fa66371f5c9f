"""Attention by the CUDA kernels' own source, on the emulator, against float64 attention on the unpacked values."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from attend_cases import (
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
from core_cases import DTYPES, HEAD_DIMS, codecs, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st

from mixkvq import arrays, reference
from mixkvq.config import BlockCodec, MixKVQConfig

pytestmark = emulator.NEEDED
PRECISIONS = ("exact", "default")


def random_attend(
    seed: int, codec: BlockCodec, heads: int, group: int, queries: int, mask_kind: str, blocks: int
) -> None:
    (q, records, k, v, exact), options = random_case(seed, codec, heads, group, queries, mask_kind, blocks, False)
    expected = reference.attend(q, records, k, v, exact, **options)
    rng = np.random.default_rng(seed)
    mu = options.pop("mu")
    # more places than blocks, as a table of fixed size has
    packed = emulator.Packed(records, codec.head_dim, mu=mu, capacity=blocks + int(rng.choice([0, 3])))
    for precision in PRECISIONS:
        got = emulator.attend(
            q, packed, k, v, exact, **options, precision=precision, workspace=bool(rng.random() < 0.7)
        )
        check(got, expected, precision)


@examples(60)
@given(*CASES)
def test_attention_is_within_the_bound(seed, codec, heads, group, queries, mask_kind, blocks):
    random_attend(seed, codec, min(heads, 2), group, min(queries, 1 + 24 // group), mask_kind, min(blocks, 2))


@examples(8)
@given(CASES[0], codecs(lengths=(160, 288)), st.sampled_from([1, 10, 12, 16]), st.sampled_from(["causal", "float"]))
def test_long_blocks_and_large_groups(seed, codec, group, mask_kind):
    random_attend(seed, codec, 1, group, 1, mask_kind, 2)


@pytest.mark.slow
@examples(200, fixed=False)
@given(*CASES)
def test_attention_is_within_the_bound_at_length(seed, codec, heads, group, queries, mask_kind, blocks):
    random_attend(seed, codec, min(heads, 2), group, queries, mask_kind, blocks)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", ["default", "compact", "near-lossless", "paper", "kivi-2", "kivi-4", "lossless"])
def test_presets_are_within_the_bound(preset, head_dim):
    codec = MixKVQConfig.preset(preset).codec(head_dim, DTYPES[head_dim // 8 % 3])
    random_attend(head_dim, codec, 1, 4 if head_dim % 16 else 5, 1, "causal", 3)


@pytest.mark.parametrize("value_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [32, 96, 256])
def test_blocks_of_any_length(value_bits, length):
    """Blocks of less and of more than the 128 tokens that are scored at once, and a part of those."""
    config = MixKVQConfig.preset(
        "default", value_bits=value_bits, residual_length=length, block_length=length, key_group_size=32
    )
    random_attend(length, config.codec(40, "float16"), 1, value_bits, 1, "none", 3)


@pytest.mark.parametrize("queries", range(1, 17))
def test_every_number_of_query_rows(queries):
    config = MixKVQConfig.preset("compact", residual_length=64, block_length=64, key_group_size=64)
    random_attend(queries, config.codec(64, "bfloat16"), 1, 1 + queries % 3, queries, "causal", 2)


@pytest.mark.parametrize("preset", ["default", "compact", "near-lossless", "paper", "kivi-2", "kivi-4"])
@pytest.mark.parametrize("group", [4, 8])
def test_large_logits_keep_to_what_is_promised(preset, group):
    """Up to a standard deviation of 16, with a few wide channels."""
    rng = np.random.default_rng(1)
    codec, none = MixKVQConfig.preset(preset).codec(128, "float32"), np.zeros((1, 1, 0, 128), np.float32)
    width = np.exp(0.7 * rng.standard_normal(128))
    width[[3, 77]] *= 8
    k = (rng.standard_normal((1, 1, 256, 128)) * width).astype(np.float32)
    v = rng.standard_normal((1, 1, 256, 128)).astype(np.float32)
    q = rng.standard_normal((1, group, 1, 128)) * np.exp(0.6 * rng.standard_normal(128))
    for std in (1, 16):
        q = (q * std / np.std(np.einsum("abcd,td->abct", q, k[0, 0]) * 128**-0.5)).astype(np.float32)
        packed = arrays.pack(codec, k, v, importance=np.sqrt((q**2).mean((0, 1, 2))).astype(np.float32)[None, None])
        expected = reference.attend(q, packed.records, none, none, [0], mu=packed.mu)
        for precision, bound in (("default", 1e-3), ("exact", 1e-5)):
            got = emulator.attend(q, packed.records, none, none, [0], mu=packed.mu, precision=precision)
            error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            assert error.max() <= bound, (std, precision)


# ---- sharing of blocks ---------------------------------------------------------------------------------------------
def test_results_of_several_blocks_are_merged():
    """With a workspace the packed blocks of a head are shared out; without one, they are not. The workspace is left as
    the next call needs it."""
    rng = np.random.default_rng(4)
    codec = MixKVQConfig.preset("compact").codec(64, "float16")
    k, v = (narrowed(fill(rng, (2, 1, 7 * 128, 64), [], 2) / 2, "float16") for _ in "kv")
    window = [narrowed(fill(rng, (2, 1, 200, 64), [], 2) / 2, "float16") for _ in "kv"]
    done = arrays.pack(codec, k, v, blocks=[7, 2])
    packed = emulator.Packed(done.records, 64, mu=done.mu, capacity=20)
    q = narrowed(rng.standard_normal((2, 4, 1, 64)).astype(np.float32), "float16")
    workspace = emulator.aligned(1 << 20)
    for exact, sinks in (([150, 4], 4), ([200, 200], 0), ([0, 3], 0)):
        options = {"sink_length": sinks, "sink_logits": np.float32([0.5, -1, 0, 2])}
        expected = reference.attend(q, done.records, *window, exact, mu=done.mu, **options)
        check(emulator.attend(q, packed, *window, exact, workspace=False, **options), expected)
        for _ in range(2):
            check(emulator.attend(q, packed, *window, exact, workspace=workspace, **options), expected)
            assert (workspace[:8] == 0).all()
    assert workspace.any()


def test_a_workspace_that_cannot_be_used():
    rng = np.random.default_rng(4)
    codec = MixKVQConfig.preset("compact").codec(64, "float32")
    done = arrays.pack(codec, *(rng.standard_normal((1, 1, 512, 64)).astype(np.float32) for _ in "kv"))
    none, q = np.zeros((1, 1, 0, 64), np.float32), rng.standard_normal((1, 1, 1, 64)).astype(np.float32)
    with pytest.raises(ValueError, match="workspace is 64, must be mkvq_cuda_attend_workspace bytes"):
        emulator.attend(q, done.records, none, none, [0], mu=done.mu, workspace=emulator.aligned(64))
    with pytest.raises(ValueError, match="workspace is 1, must be aligned to 4 bytes"):
        emulator.attend(q, done.records, none, none, [0], mu=done.mu, workspace=emulator.aligned(1 << 20)[1:])


def test_a_bound_of_all_records_beyond_what_is_staged():
    """Records are then copied or read where they are, by their own length."""
    rng = np.random.default_rng(4)
    config = MixKVQConfig.preset("near-lossless", residual_length=256, block_length=256)
    codec = config.codec(128, "float32")
    done = arrays.pack(codec, *(rng.standard_normal((1, 1, 512, 128)).astype(np.float32) for _ in "kv"))
    none, q = np.zeros((1, 1, 0, 128), np.float32), rng.standard_normal((1, 2, 1, 128)).astype(np.float32)
    expected = reference.attend(q, done.records, none, none, [0], mu=done.mu)
    packed = emulator.Packed(done.records, 128, mu=done.mu)
    assert 24 * 1024 < packed.history.record_bytes < 44 * 1024
    for bound in (packed.history.record_bytes, 1 << 20):
        packed.history.record_bytes = bound
        check(emulator.attend(q, packed, none, none, [0]), expected, "exact")


# ---- outputs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_any_type_and_strides(dtype):
    rng = np.random.default_rng(7)
    records, k, v, mu, _ = plain(dim=24)
    q = rng.standard_normal((1, 3, 2, 24)).astype(np.float32)
    expected = emulator.attend(q, records, k, v, [32], mu=mu)
    for _ in range(4):
        out = strided(rng, narrowed(np.full(q.shape, 9, np.float32), dtype))
        emulator.attend(q, records, k, v, [32], mu=mu, out=out)
        assert (out == narrowed(expected, dtype)).all()


# ---- numbers that are none -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [5, 40, 70, 90])
def test_a_key_that_is_not_finite_reaches_the_queries_that_see_it(value, token):
    check_key_that_is_not_finite(emulator.attend, value, token)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [5, 40, 70, 90])
def test_a_value_that_is_not_finite_stays_in_its_channel(value, token):
    check_value_that_is_not_finite(emulator.attend, value, token)


def test_minus_infinity_in_a_key_hides_the_token():
    check_minus_infinity(emulator.attend)


def test_large_scores_do_not_overflow():
    check_large_scores(emulator.attend)


def test_a_query_that_sees_nothing_gives_zeros():
    check_query_that_sees_nothing(emulator.attend)


@given(st.integers(1, 7), st.integers(0, 3))
@examples(10)
def test_more_causal_queries_than_tokens(queries, tokens):
    _, k, v, _, rng = plain()
    q = rng.standard_normal((1, 1, queries, 16)).astype(np.float32)
    got = emulator.attend(q, [[[]]], k, v, [tokens], mask="causal", precision="exact")
    assert (got[0, 0, : max(queries - tokens, 0)] == 0).all()
    check(got, reference.attend(q, [[[]]], k, v, [tokens], mask="causal"))
