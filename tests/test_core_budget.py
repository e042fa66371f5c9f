"""Bits under a budget of columns, per head and pooled: the core against the oracle, and what the choice guarantees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from core_cases import TROUBLES, codecs, examples, fill
from hypothesis import given
from hypothesis import strategies as st
from inputs import codec_of, ramp
from test_core_pack import check_pack, random_pack

from mixkvq import reference
from mixkvq.reference import budget, layout, tiers

pytest_plugins = ["core_fixtures"]
BITS = np.array([1, 2, 3, 4, 8])


def budget_codec(allocate: str = "layer", columns: int = 0, head_dim: int = 64, cost: str = "model", **fields):
    """Blocks of 32 tokens; ``columns`` per head, by default a key budget of 4 bits."""
    codec = codec_of(head_dim, block_length=32, residual_length=32, key_group_size=32, allocate=allocate,
                     key_budget=4.0, pattern_cost=cost, **fields)  # fmt: skip
    return dataclasses.replace(codec, budget_columns=columns) if columns else codec


def columns_of(record: bytes) -> int:
    return sum(layout.column_counts(reference.parse(record).counts))


def pack(codec, k, v, importance=None, mu=None):
    """The oracle's records of one block of every head, checked against the core."""
    packed = check_pack(codec, k[None], v[None], np.zeros(1, np.int64), np.ones(1, np.int64), importance, mu)
    return [head[0] for head in packed.records[0]]


def tiers_of(records):
    return [reference.parse(record).tiers for record in records]


@examples(150)
@given(
    st.integers(0, 2**32),
    codecs(lengths=(32, 64)).filter(lambda codec: codec.allocate in ("budget", "layer")),
    st.integers(1, 5),
    st.integers(1, 3),
    st.lists(st.sampled_from(TROUBLES), max_size=3),
    st.integers(0, 3).map(lambda n: n == 0),
)
def test_records_equal_the_oracle(isa, seed, codec, heads, blocks, troubles, poison):
    random_pack(seed, codec, heads, blocks, troubles, poison)


@pytest.mark.parametrize("cost", ["model", "measured"])
@pytest.mark.parametrize("allocate", ["budget", "layer"])
def test_ties_equal_the_oracle(isa, allocate, cost):
    """Equal channels and equal heads: lower heads and lower channels take the steps first."""
    column = ramp(32, 4)
    for order in ([0] * 32, [0, 1] * 16, [0, 1, 2, 3] * 8, [3] * 5 + [0] * 27):
        k = np.ascontiguousarray(np.stack([column[:, order]] * 3))
        for columns in range(1, 9):
            codec = budget_codec(allocate, columns, 32, cost, key_reference="none")
            for weight in (1, 0, 2.5):
                records = pack(codec, k, k, np.full((1, 3, 32), weight, np.float32))
                if allocate == "layer":
                    assert columns_of(records[0]) >= columns_of(records[2])
                assert sum(map(columns_of, records)) <= 3 * columns


@examples(60)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(3, 7))
def test_measured_errors_equal_the_oracle_to_the_last_bit(isa, seed, tier, columns):
    """Channels hold the same numbers in another order: their errors differ by roundings, which decide who gets bits.

    Most numbers lie within a few units in the last place of half a step of one width's scale.
    """
    rng = np.random.default_rng(seed)
    levels = 2 ** (tier + 1) - 1
    scale = np.float32(2.0 ** rng.integers(-8, 5) * (1 + rng.integers(0, 8) / 8))
    codes = rng.integers(0, levels, 32) + np.float32(0.5)
    column = (codes.astype(np.float32) * scale).view(np.int32) + rng.integers(-2, 3, 32).astype(np.int32)
    column = column.view(np.float32)
    column[:2] = 0, np.float32(levels) * scale
    k = np.ascontiguousarray(np.stack([rng.permutation(column) for _ in range(64)], axis=1))[None]
    pack(budget_codec("budget", columns, 64, "measured", key_reference="none"), k, ramp(32, 64)[None])


@pytest.mark.parametrize("allocate", ["budget", "layer"])
def test_the_budget_is_kept_and_pooled(isa, allocate):
    """One head's queries weigh a hundred times more: it takes columns from the others only where they are pooled."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 4, 32, 64)).astype(np.float32)
    weight = np.ones((1, 4, 64), np.float32)
    weight[0, 2] = 100
    for columns in range(2, 17):
        used = [columns_of(r) for r in pack(budget_codec(allocate, columns), k, v, weight)]
        if allocate == "layer":
            assert 4 * columns - 1 <= sum(used) <= 4 * columns  # another step needs at most one more column
            assert used[2] == max(used) and (used[2] > columns or columns in (2, 16))  # 2: nothing is left to spend
        else:
            assert max(used) <= columns and min(used) >= columns - 1


def test_the_largest_record_fits_its_slot(isa):
    from mixkvq import arrays

    for head_dim, columns in ((8, 2), (64, 8), (256, 32)):
        k = ramp(32, 3 * head_dim).reshape(32, 3, head_dim).swapaxes(0, 1)
        weight = np.zeros((1, 3, head_dim), np.float32)
        weight[0, 1] = 1e3
        codec = budget_codec("layer", columns, head_dim, value_bits=16)
        records = pack(codec, k, k, weight)
        assert [columns_of(r) for r in records] == [-(-head_dim // 32), head_dim // 4, -(-head_dim // 32)]
        assert max(map(len, records)) <= arrays.core_codec(codec).record_bound


@examples(100)
@given(st.integers(0, 2**32), st.sampled_from(["model", "measured"]), st.integers(2, 16))
def test_no_plan_with_the_same_bits_has_less_error(seed, cost, columns):
    """Greedy on convex hulls: optimal for the code bits that it uses; for more bits by at most the next step's gain."""
    rng = np.random.default_rng(seed)
    codec = budget_codec("budget", columns, 64, cost)
    x = fill(rng, (1, 1, 32, 64), [], 2)[0, 0]
    weight = np.exp(rng.standard_normal(64)).astype(np.float32)
    costs, fits = tiers.tier_costs(codec, x, weight)
    assert fits.all()
    (chosen,) = budget.choose_pooled(columns, [(costs, fits)])
    total = lambda plan: float(costs[plan, np.arange(64)].astype(np.float64).sum())  # noqa: E731
    mine, bits = total(chosen), int(BITS[chosen].sum())
    taken = [budget.hull(costs[:, c], fits[:, c]) for c in range(64)]
    gains = [
        float(points[at + 1][1])
        for points, tier in zip(taken, chosen, strict=True)
        if (at := [t for t, _ in points].index(tier)) + 1 < len(points)
    ]
    gain = max(gains, default=0.0)
    for _ in range(200):
        plan = rng.permutation(np.repeat(np.arange(5), rng.multinomial(64, rng.dirichlet(np.ones(5)))))
        plan = plan[np.argsort(np.argsort(-weight * x.std(0)))] if rng.random() < 0.5 else plan
        extra = int(BITS[plan].sum()) - bits
        assert total(plan) + max(extra, 0) * gain >= mine * (1 - 1e-5)
    for pattern in codec.patterns:  # whole columns, bits by rank: what a menu of one record size would take
        plan = tiers.assign(weight * (x.max(0) - x.min(0)), pattern)
        assert total(plan) + max(int(BITS[plan].sum()) - bits, 0) * gain >= mine * (1 - 1e-5)


def test_tiers_follow_their_channels_and_heads(isa):
    rng = np.random.default_rng(3)
    k, v = fill(rng, (1, 4, 32, 64), [], 2)[0], ramp(32, 256).reshape(32, 4, 64).swapaxes(0, 1)
    weight = np.exp(rng.standard_normal((1, 4, 64))).astype(np.float32)
    codec = budget_codec(key_reference="none")
    plain = tiers_of(pack(codec, k, v, weight))
    assert len({sum(BITS[list(head)]) for head in plain}) > 1
    channels, heads = rng.permutation(64), rng.permutation(4)
    moved = tiers_of(pack(codec, k[:, :, channels], v, weight[:, :, channels]))
    assert moved == [tuple(np.array(head)[channels].tolist()) for head in plain]
    assert tiers_of(pack(codec, k[heads], v, weight[:, heads])) == [plain[h] for h in heads]


@pytest.mark.parametrize("reference_", ["static", "none"])
def test_heads_that_become_exact(isa, reference_):
    """Without a coded key block a head takes no part; a value that is not finite changes nothing for the others."""
    k, v = ramp(32, 192).reshape(32, 3, 64).swapaxes(0, 1).copy(), ramp(32, 192, 5).reshape(32, 3, 64).swapaxes(0, 1)
    codec = budget_codec(key_reference=reference_)
    weight = np.linspace(0.1, 3, 192, dtype=np.float32).reshape(1, 3, 64)
    plain = pack(codec, k, v, weight)
    bad_v = v.copy()
    bad_v[1, 3, 3] = np.inf
    records = pack(codec, k, bad_v, weight)
    assert reference.parse(records[1]).exact and [records[0], records[2]] == [plain[0], plain[2]]
    bad_k = k.copy()
    bad_k[1, 3, 3] = np.nan
    records = pack(codec, bad_k, v, weight)
    assert reference.parse(records[1]).exact
    assert [records[0], records[2]] == pack(codec, k[[0, 2]], v[[0, 2]], weight[:, [0, 2]])


def test_tiers_that_cannot_be_coded(isa):
    """Ranges beyond what an e5m3 scale holds at few bits: the channel starts higher, or the block is exact."""
    k, v = np.stack([ramp(32, 16)] * 2), np.stack([ramp(32, 16, 1)] * 2)
    codec = budget_codec("layer", 2, 16, "measured", key_reference="none", key_range="minmax")
    k[0, :, :3] *= 100  # up to 800: three bits and more
    k[0, :, 3] *= 5000  # up to 40000: eight bits
    (first, second) = tiers_of(pack(codec, k, v))
    assert min(first[:3]) >= 2 and first[3] == 4 and 5 not in first + second
    assert sum(map(columns_of, pack(codec, k, v))) <= 4
    k[0] = 5000 * ramp(32, 16)  # all of head 0 at eight bits: 4 columns, and 1 for head 1
    assert all(reference.parse(r).exact for r in pack(codec, k, v))
    wide = dataclasses.replace(codec, budget_columns=3)
    assert [columns_of(r) for r in pack(wide, k, v)] == [4, 2]
    alone = dataclasses.replace(codec, allocate="budget")
    assert [reference.parse(r).exact for r in pack(alone, k, v)] == [True, False]
    k[0, :, 0] = 1e6 * ramp(32, 1)[:, 0]  # nothing holds it
    assert [reference.parse(r).exact for r in pack(wide, k, v)] == [True, False]


def test_costs_that_overflow_leave_no_tier(isa):
    k = np.stack([ramp(32, 16)] * 2)
    weight = np.ones((1, 2, 16), np.float32)
    weight[0, 0, 3] = 1e25  # its square is infinite
    for allocate in ("budget", "layer"):
        records = pack(budget_codec(allocate, 2, 16), k, k, weight)
        assert [reference.parse(r).exact for r in records] == [True, False]


@pytest.mark.parametrize(("columns", "head_dim"), [(0, 64), (1, 64), (17, 64), (-1, 64), (1, 40), (11, 40)])
def test_columns_out_of_range_are_refused(columns, head_dim):
    from mixkvq import arrays

    codec = dataclasses.replace(budget_codec("budget", 4, head_dim), budget_columns=columns)
    with pytest.raises(ValueError, match=f"budget_columns is {columns}, must be"):
        arrays.core_codec(codec)
