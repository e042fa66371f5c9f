"""Attention over sinks, packed blocks and window: the C core against float64 attention on the unpacked values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from core_cases import DTYPES, HEAD_DIMS, codecs, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st

from mixkvq import reference
from mixkvq.config import BlockCodec, MixKVQConfig

pytest_plugins = ["core_fixtures"]
BOUNDS = {"exact": 1e-5, "default": 2e-3, "fast": 6e-2}
SINGLE = {"exact": 20, "default": 5, "fast": 3}  # how far one query may be beyond the bound of all


def history(rng: np.random.Generator, codec: BlockCodec, batch: int, heads: int, max_blocks: int, exact_share: float):
    """Ragged rows of records, coded and exact mixed, and the references."""
    records = [[[] for _ in range(heads)] for _ in range(batch)]
    mu = np.zeros((batch, heads, codec.head_dim), np.float16)
    for b in range(batch):
        kinds = rng.random(rng.integers(0, max_blocks + 1)) < exact_share
        lengths = [int(rng.integers(1, 70)) if exact else codec.block_length for exact in kinds]
        for h in range(heads):
            old = None
            for exact, length in zip(kinds, lengths, strict=True):
                k, v = (
                    narrowed(fill(rng, (1, 1, length, codec.head_dim), [], 2)[0, 0] / 2, codec.dtype) for _ in range(2)
                )
                plan = dataclasses.replace(codec, allocate="exact", block_length=length) if exact else codec
                record, old, _ = reference.pack_block(plan, k, v, None, old)
                records[b][h].append(record)
            if old is not None:
                mu[b, h] = old
    return records, mu


def relative(got, expected):
    """Relative L2 error over the head_dim of every query that may see something."""
    miss = np.linalg.norm(got.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected, axis=-1)
    assert (miss[size == 0] == 0).all()
    return miss, size


def check(got, expected, precision="exact"):
    """The stated bound for every row of the batch; no single query far beyond it."""
    miss, size, bound = *relative(got, expected), BOUNDS[precision]
    for b in range(len(got)):
        assert np.linalg.norm(miss[b]) <= bound * np.linalg.norm(size[b])
    assert (miss <= SINGLE[precision] * bound * size + 1e-7).all()


def random_mask(rng: np.random.Generator, kind: str, batch: int, heads: int, queries: int, columns: int):
    shape = (batch if rng.random() < 0.7 else 1, heads if rng.random() < 0.3 else 1, queries, columns)
    seen = rng.random(shape) < rng.choice([0.1, 0.6, 0.95])
    if rng.random() < 0.3:
        seen[:, :, rng.integers(queries)] = False
    if kind == "bool":
        return seen
    return np.where(seen, 2 * rng.standard_normal(shape), -np.inf).astype(np.float32)


def random_attend(
    seed: int, codec: BlockCodec, heads: int, group: int, queries: int, mask_kind: str, blocks: int
) -> None:
    from mixkvq import arrays

    rng = np.random.default_rng(seed)
    batch, dim = int(rng.integers(1, 4)), codec.head_dim
    records, mu = history(rng, codec, batch, heads, blocks, rng.choice([0.0, 0.3, 1.0]))
    capacity = int(rng.integers(1, 150))
    k, v = (strided(rng, narrowed(fill(rng, (batch, heads, capacity, dim), [], 2) / 2, codec.dtype)) for _ in range(2))
    exact = rng.integers(0, capacity + 1, batch)
    q = rng.standard_normal((batch, heads * group, queries, dim)) * rng.choice([0.1, 1.0])
    q = strided(rng, narrowed(q.astype(np.float32), codec.dtype))
    lengths = [int(exact[b]) + sum(reference.parse(r).tokens for r in records[b][0]) for b in range(batch)]
    full = min((int(exact[b]) for b in range(batch) if records[b][0]), default=99)  # sinks come before any packing
    start = rng.integers(0, 30, batch) if rng.random() < 0.6 else None
    columns = max(n + (0 if start is None else int(start[b])) for b, n in enumerate(lengths)) + int(rng.integers(0, 5))
    mask = {"none": None, "causal": "causal"}.get(mask_kind, "array")
    if mask == "array":
        mask = random_mask(rng, mask_kind, batch, heads * group, queries, max(columns, 1))
    options = {
        "dtype": codec.dtype,
        "mu": mu,
        "start": start,
        "sink_length": min(int(rng.choice([0, 1, 4, 40])), full),
        "mask": mask,
        "scaling": None if rng.random() < 0.5 else float(rng.uniform(0.02, 0.3)),
        "softcap": float(rng.choice([0.0, 0.0, 5.0, 50.0])),
        "sink_logits": rng.standard_normal(heads * group).astype(np.float32) if rng.random() < 0.3 else None,
    }
    expected = reference.attend(q, records, k, v, exact, **options)
    for precision in BOUNDS:
        got = arrays.attend(q, records, k, v, exact, **options, precision=precision)
        assert got.shape == expected.shape
        assert got.dtype == np.float32
        check(got, expected, precision)


CASES = (
    st.integers(0, 2**32),
    codecs(lengths=(32, 64)),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    st.one_of(st.just(1), st.integers(1, 40)),
    st.sampled_from(["none", "causal", "bool", "float"]),
    st.integers(0, 4),
)


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


def plain(dim=16, tokens=96, dtype="float32", poison=None):
    """One row, one head: two blocks of 32 and a window of 32; optionally one K or V element replaced."""
    config = MixKVQConfig(block_length=32, residual_length=32, key_group_size=32)
    codec = config.codec(dim, dtype)
    rng = np.random.default_rng(3)
    k, v = (fill(rng, (1, 1, tokens, dim), [], 2) / 2 for _ in range(2))
    if poison is not None:
        which, token, value = poison
        (k if which == "k" else v)[0, 0, token, 2] = value
    k, v = narrowed(k, dtype), narrowed(v, dtype)
    records, mu, _ = reference.pack_head(codec, k[0, 0, :64], v[0, 0, :64])
    return [[records]], k[:, :, 64:], v[:, :, 64:], (None if mu is None else mu[None, None]), rng


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [5, 40, 70, 90])
def test_a_key_that_is_not_finite_reaches_the_queries_that_see_it(isa, value, token):
    """Causal queries before the token stay finite and right; those from the token on are NaN."""
    from mixkvq import arrays

    records, k, v, mu, rng = plain(poison=("k", token, value))
    q = rng.standard_normal((1, 2, 96, 16)).astype(np.float32)
    q[..., 2] = np.abs(q[..., 2]) + 0.1
    got = arrays.attend(q, records, k, v, [32], mask="causal", mu=mu, precision="exact")
    expected = reference.attend(q, records, k, v, [32], mask="causal", mu=mu)
    assert np.isnan(got[:, :, token:]).all()
    assert np.isnan(expected[:, :, token:]).all()
    check(got[:, :, :token], expected[:, :, :token])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [5, 40, 70, 90])
def test_a_value_that_is_not_finite_stays_in_its_channel(isa, value, token):
    """Every query that sees it is not finite there. What a masked one does, torch leaves open, and so do we."""
    from mixkvq import arrays

    records, k, v, mu, rng = plain(poison=("v", token, value))
    q = rng.standard_normal((1, 2, 96, 16)).astype(np.float32)
    got = arrays.attend(q, records, k, v, [32], mask="causal", mu=mu, precision="exact")
    expected = reference.attend(q, records, k, v, [32], mask="causal", mu=mu)
    assert not np.isfinite(got[:, :, token:, 2]).any()
    check(np.delete(got, 2, axis=-1), np.delete(expected, 2, axis=-1))


def test_minus_infinity_in_a_key_hides_the_token(isa):
    from mixkvq import arrays

    records, k, v, mu, rng = plain(poison=("k", 70, -np.inf))
    q = np.abs(rng.standard_normal((1, 1, 3, 16))).astype(np.float32)
    got = arrays.attend(q, records, k, v, [32], mu=mu, precision="exact")
    check(got, reference.attend(q, records, k, v, [32], mu=mu))
    assert np.isfinite(got).all()


def test_large_scores_do_not_overflow(isa):
    """Scores of a few thousands: the softmax is all but one-hot, and exp must not overflow."""
    from mixkvq import arrays

    records, k, v, mu, rng = plain()
    q = (rng.standard_normal((1, 1, 8, 16)) * 1000).astype(np.float32)
    got = arrays.attend(q, records, k, v, [32], mu=mu, precision="exact")
    assert np.isfinite(got).all()
    expected = reference.attend(q, records, k, v, [32], mu=mu)
    assert (np.linalg.norm(got - expected, axis=-1) <= 5e-3 * np.linalg.norm(expected, axis=-1)).all()


def test_a_query_that_sees_nothing_gives_zeros(isa):
    from mixkvq import arrays

    records, k, v, mu, rng = plain()
    q = rng.standard_normal((1, 1, 2, 16)).astype(np.float32)
    mask = np.zeros((1, 1, 2, 96), bool)
    mask[0, 0, 1, 17] = True
    for sinks in (None, np.array([0.5], np.float32)):
        got = arrays.attend(q, records, k, v, [32], mu=mu, mask=mask, sink_logits=sinks, precision="exact")
        assert (got[0, 0, 0] == 0).all()
        assert (got[0, 0, 1] != 0).any()
        check(got, reference.attend(q, records, k, v, [32], mu=mu, mask=mask, sink_logits=sinks))
    empty = arrays.attend(q, [[[]]], k[:, :, :0], v[:, :, :0], [0])
    assert (empty == 0).all()


def test_more_causal_queries_than_tokens(isa):
    from mixkvq import arrays

    _, k, v, _, rng = plain()
    q = rng.standard_normal((1, 1, 7, 16)).astype(np.float32)
    got = arrays.attend(q, [[[]]], k, v, [3], mask="causal", precision="exact")
    assert (got[0, 0, :4] == 0).all()
    assert (got[0, 0, 4] == v[0, 0, 0]).all()
    check(got, reference.attend(q, [[[]]], k, v, [3], mask="causal"))
