"""Random histories, windows and masks for the tests of attention, and the bounds of its results."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from core_cases import codecs, fill, narrowed, strided
from hypothesis import strategies as st

from mixkvq import reference
from mixkvq.config import BlockCodec, MixKVQConfig

BOUNDS = {"exact": 1e-5, "default": 2e-3, "fast": 6e-2}
SINGLE = {"exact": 20, "default": 5, "fast": 3}  # how far one query may be beyond the bound of all


def history(
    rng: np.random.Generator,
    codec: BlockCodec,
    batch: int,
    heads: int,
    max_blocks: int,
    exact_share: float,
    any_length: bool = True,
):
    """Ragged rows of records, coded and exact mixed, and the references; exact ones of any length or the block's."""
    records = [[[] for _ in range(heads)] for _ in range(batch)]
    mu = np.zeros((batch, heads, codec.head_dim), np.float16)
    for b in range(batch):
        kinds = rng.random(rng.integers(0, max_blocks + 1)) < exact_share
        lengths = [int(rng.integers(1, 70)) if exact and any_length else codec.block_length for exact in kinds]
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


def random_case(
    seed: int,
    codec: BlockCodec,
    heads: int,
    group: int,
    queries: int,
    mask_kind: str,
    blocks: int,
    any_length: bool = True,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options of an attention; `history` tells what any_length is."""
    rng = np.random.default_rng(seed)
    batch, dim = int(rng.integers(1, 4)), codec.head_dim
    records, mu = history(rng, codec, batch, heads, blocks, rng.choice([0.0, 0.3, 1.0]), any_length)
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
    return (q, records, k, v, exact), options


CASES = (
    st.integers(0, 2**32),
    codecs(lengths=(32, 64)),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    st.one_of(st.just(1), st.integers(1, 40)),
    st.sampled_from(["none", "causal", "bool", "float"]),
    st.integers(0, 4),
)


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


# ---- numbers that are none, or large: what both back ends must do; `attend` is called as `reference.attend` ---------
def check_key_that_is_not_finite(attend, value, token):
    """Causal queries before the token stay finite and right; those from the token on are NaN."""
    records, k, v, mu, rng = plain(poison=("k", token, value))
    q = rng.standard_normal((1, 2, 96, 16)).astype(np.float32)
    q[..., 2] = np.abs(q[..., 2]) + 0.1
    got = attend(q, records, k, v, [32], mask="causal", mu=mu, precision="exact")
    expected = reference.attend(q, records, k, v, [32], mask="causal", mu=mu)
    assert np.isnan(got[:, :, token:]).all()
    assert np.isnan(expected[:, :, token:]).all()
    check(got[:, :, :token], expected[:, :, :token])


def check_value_that_is_not_finite(attend, value, token):
    """Every query that sees it is not finite there. What a masked one does, torch leaves open, and so do we."""
    records, k, v, mu, rng = plain(poison=("v", token, value))
    q = rng.standard_normal((1, 2, 96, 16)).astype(np.float32)
    got = attend(q, records, k, v, [32], mask="causal", mu=mu, precision="exact")
    expected = reference.attend(q, records, k, v, [32], mask="causal", mu=mu)
    assert not np.isfinite(got[:, :, token:, 2]).any()
    check(np.delete(got, 2, axis=-1), np.delete(expected, 2, axis=-1))


def check_minus_infinity(attend):
    records, k, v, mu, rng = plain(poison=("k", 70, -np.inf))
    q = np.abs(rng.standard_normal((1, 1, 3, 16))).astype(np.float32)
    got = attend(q, records, k, v, [32], mu=mu, precision="exact")
    check(got, reference.attend(q, records, k, v, [32], mu=mu))
    assert np.isfinite(got).all()


def check_large_scores(attend):
    """Scores of a few thousands: the softmax is all but one-hot, and exp must not overflow."""
    records, k, v, mu, rng = plain()
    q = (rng.standard_normal((1, 1, 8, 16)) * 1000).astype(np.float32)
    got = attend(q, records, k, v, [32], mu=mu, precision="exact")
    assert np.isfinite(got).all()
    expected = reference.attend(q, records, k, v, [32], mu=mu)
    assert (np.linalg.norm(got - expected, axis=-1) <= 5e-3 * np.linalg.norm(expected, axis=-1)).all()


def check_query_that_sees_nothing(attend):
    records, k, v, mu, rng = plain()
    q = rng.standard_normal((1, 1, 2, 16)).astype(np.float32)
    mask = np.zeros((1, 1, 2, 96), bool)
    mask[0, 0, 1, 17] = True
    for sinks in (None, np.array([0.5], np.float32)):
        got = attend(q, records, k, v, [32], mu=mu, mask=mask, sink_logits=sinks, precision="exact")
        assert (got[0, 0, 0] == 0).all()
        assert (got[0, 0, 1] != 0).any()
        check(got, reference.attend(q, records, k, v, [32], mu=mu, mask=mask, sink_logits=sinks))
    empty = attend(q, [[[]]], k[:, :, :0], v[:, :, :0], [0])
    assert (empty == 0).all()
