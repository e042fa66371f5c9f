"""Packing: the CUDA kernels on the emulator against the CPU core, byte for byte."""

from __future__ import annotations

import dataclasses

import emulator
import numpy as np
import pytest
from core_cases import DTYPES, TROUBLES, codecs, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st
from inputs import beside_ties, codec_of, ramp
from test_golden import FACTS, NAMES, make, stored

from mixkvq import arrays, list_presets
from mixkvq.config import BlockCodec, MixKVQConfig

pytestmark = emulator.NEEDED


def difference(got: bytes, expected: bytes) -> str:
    at = [i for i, (x, y) in enumerate(zip(got, expected, strict=False)) if x != y]
    return f"lengths {len(got)}, {len(expected)}; {len(at)} bytes differ, first {at[:8]}"


def check(codec: BlockCodec, k: np.ndarray, v: np.ndarray, **fields) -> arrays.Packed:
    """Records, raised scales and references of the kernels are the core's."""
    got, expected = emulator.pack(codec, k, v, **fields), arrays.pack(codec, k, v, **fields)
    for mine, theirs in zip(got.records, expected.records, strict=True):
        for head, other in zip(mine, theirs, strict=True):
            assert len(head) == len(other)
            for record, wanted in zip(head, other, strict=True):
                assert record == wanted, difference(record, wanted)
    assert got.raised.tolist() == expected.raised.tolist()
    if codec.key_reference:
        assert got.has_mu is not None and got.mu is not None and expected.mu is not None
        assert (got.has_mu == expected.has_mu).all()
        assert (got.mu.view(np.uint16) == expected.mu.view(np.uint16)).all()
    return got


def both(rng: np.random.Generator, codec: BlockCodec, heads: int, tokens: int, troubles: list[str]):
    return [narrowed(fill(rng, (1, heads, tokens, codec.head_dim), troubles, 2), codec.dtype) for _ in "kv"]


def weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray | None:
    kinds = [None, np.exp(rng.standard_normal(shape)), rng.integers(0, 3, shape)]
    chosen = kinds[rng.integers(3)]
    return None if chosen is None else chosen.astype(np.float32)


# ---- random contents -----------------------------------------------------------------------------------------------
@examples(25)
@given(
    st.integers(0, 2**32),
    codecs(head_dims=(8, 16, 24, 40), lengths=(32, 64)),
    st.lists(st.sampled_from(TROUBLES), max_size=3),
    st.integers(0, 3).map(lambda n: n == 0),
)
def test_records_are_those_of_the_core(seed, codec, troubles, poison):
    """Contents, strides, starts and block counts; the second call goes on with the first one's state."""
    rng = np.random.default_rng(seed)
    batch, heads, blocks = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    tokens = blocks * codec.block_length + int(rng.integers(0, 20))
    shape = (batch, heads, tokens, codec.head_dim)
    k, v = (fill(rng, shape, troubles, axis) for axis in (2, int(rng.integers(2, 4))))
    if poison:
        for x in (k, v)[: rng.integers(1, 3)]:
            x[tuple(rng.integers(size) for size in shape)] = rng.choice([np.nan, np.inf, -np.inf])
    k, v = strided(rng, narrowed(k, codec.dtype)), strided(rng, narrowed(v, codec.dtype))
    count = rng.integers(0 if batch > 1 else 1, blocks + 1, batch)
    first = np.array([rng.integers(0, tokens - n * codec.block_length + 1) for n in count], np.int64)
    weight = weights(rng, (batch, heads, codec.head_dim))
    packed = check(codec, k, v, first=first, blocks=count, importance=weight)
    if codec.key_reference and seed % 2:
        zeros = np.zeros(batch, np.int64)
        check(codec, k, v, first=zeros, blocks=zeros + 1, importance=weight, mu=packed.mu, has_mu=packed.has_mu)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_presets_at_every_head_dim(head_dim):
    rng = np.random.default_rng(head_dim)
    presets = list_presets()
    for i in (head_dim // 8, head_dim // 16 + 3):
        codec = codec_of(head_dim, DTYPES[i % 3], presets[i % len(presets)])
        k, v = both(rng, codec, 1, codec.block_length, ["integers"])
        check(codec, k, v, importance=np.ones((1, 1, head_dim), np.float32))


@pytest.mark.parametrize("preset", list_presets())
def test_presets(preset):
    rng = np.random.default_rng(1)
    codec = codec_of(64, "bfloat16", preset)
    k, v = both(rng, codec, 1, 2 * codec.block_length, ["outlier 1e4"])
    check(codec, k, v, importance=np.exp(rng.standard_normal((1, 1, 64))).astype(np.float32))


@pytest.mark.parametrize(("length", "group"), [(160, 32), (256, 64), (512, 512), (768, 96), (1024, 128)])
def test_long_blocks(length, group):
    codec = codec_of(16, "float16", block_length=length, residual_length=length, key_group_size=group,
                     key_range="minmax", value_range="minmax")  # fmt: skip
    codec = dataclasses.replace(codec, patterns=((2, 4, 3, 3, 2, 2), (0, 8, 0, 4, 4, 0)), key_metadata="fp16")
    rng = np.random.default_rng(length)
    check(codec, *both(rng, codec, 1, length, ["constant", "nearly constant"]))


@pytest.mark.parametrize("rows", [(0, 2, 1), (3, 0, 0)])
@pytest.mark.parametrize("allocate", ["patterns", "layer"])
def test_rows_of_different_lengths(rows, allocate):
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32)
    columns = {"budget_columns": 2} if allocate == "layer" else {"patterns": ((0, 16, 0, 0, 0, 0),)}
    codec = dataclasses.replace(codec, allocate=allocate, **columns)
    k, v = (ramp(3 * 110, 32, seed).reshape(3, 110, 2, 16).transpose(0, 2, 1, 3) for seed in (1, 2))
    packed = check(codec, k, v, first=[3, 2, 7], blocks=list(rows))
    assert [len(row[0]) for row in packed.records] == list(rows)


# ---- what is unusual -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trouble", TROUBLES)
def test_unusual_channels(trouble):
    """Every width meets every unusual channel, in keys and in values."""
    for i, width in enumerate((1, 2, 3, 4, 8)):
        metadata, rule = ("e5m3", "fp16")[i % 2], ("minmax", "search")[len(trouble) % 2]
        codec = codec_of(8, block_length=32, residual_length=32, key_group_size=32, key_range=rule, value_range=rule,
                         key_metadata=metadata, value_metadata=metadata, value_basis="identity", value_bits=width,
                         key_reference=("none", "static")[width % 2], key_patterns=({width: 64},))  # fmt: skip
        rng = np.random.default_rng(width)
        k, v = (narrowed(fill(rng, (1, 2, 32, 8), [trouble] * 2, axis), "float32") for axis in (2, 3))
        check(codec, k, v)


def test_constant_and_tiny_groups_of_fp16_metadata():
    """Both have the smallest scale; only where all elements are equal are all codes 0."""
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32, key_metadata="fp16",
                     value_metadata="fp16", key_reference="none", value_basis="identity", value_group_size=8,
                     key_range="minmax", value_range="minmax", key_patterns=({2: 64},))  # fmt: skip
    codec = dataclasses.replace(codec, key_group=8)
    k = np.full((1, 1, 32, 16), 7.7, np.float32)
    k[..., 8:] = np.float32(1e-3) + ramp(32, 8) * np.float32(1e-8)
    check(codec, k, k)


@pytest.mark.parametrize("cost", ["model", "measured"])
@pytest.mark.parametrize("allocate", ["patterns", "threshold"])
def test_ties_between_channels(cost, allocate):
    """Many channels with the same A, and patterns with the same cost; A that is not a number."""
    menu = ((4, 4, 4, 2, 1, 1), (4, 4, 4, 2, 1, 1), (0, 8, 8, 0, 0, 0), (8, 0, 0, 8, 0, 0), (16, 0, 0, 0, 0, 0))
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32, pattern_cost=cost, allocate=allocate,
                     key_range="minmax", key_reference="none")  # fmt: skip
    codec = dataclasses.replace(codec, patterns=menu)
    for order in ([0] * 16, [0, 1] * 8, [3] * 5 + [0] * 11):
        k = np.ascontiguousarray(ramp(32, 4)[:, order])[None, None]
        for weight in (1, 0, 2.5):
            check(codec, k, k, importance=np.full((1, 1, 16), weight, np.float32))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        k, v = ramp(32, 16, seed)[None, None], ramp(32, 16, seed + 50)[None, None]
        for channel in rng.choice(16, rng.integers(1, 4), replace=False):
            k[0, 0, :, channel] = rng.choice([-1, 1], 32) * rng.choice([3.3e38, 1e30, 1e20])
        check(codec, k, v, importance=rng.integers(0, 2, (1, 1, 16)).astype(np.float32))


@examples(20)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4]))
def test_quotients_beside_a_rounding_tie(seed, width):
    """Elements within a few units in the last place of half a step, for scales whose reciprocal is not exact."""
    check(*beside_ties(seed, width, 32))


@pytest.mark.parametrize("tokens", [[5], list(range(32))])
@pytest.mark.parametrize("signs", [1, -1])
def test_values_that_overflow_in_the_rotation_make_the_block_exact(tokens, signs):
    for head_dim, width in ((8, 1), (24, 3), (64, 8)):
        codec = codec_of(head_dim, block_length=32, residual_length=32, key_group_size=32, value_bits=width,
                         key_range="minmax", value_range="minmax")  # fmt: skip
        k, v = ramp(32, head_dim)[None, None], ramp(32, head_dim, 1)[None, None]
        v[0, 0, tokens] = 3e38 * np.float32(signs) ** np.arange(head_dim, dtype=np.float32)
        assert arrays.inspect(check(codec, k, v).records[0][0][0])["kind"] == 1


def test_the_reference_is_set_by_the_first_coded_block():
    codec = codec_of(16, "float16", block_length=32, residual_length=32, key_group_size=32, key_range="minmax")
    k, v = (narrowed(ramp(160, 48, s).reshape(1, 160, 3, 16).transpose(0, 2, 1, 3), "float16") for s in (1, 2))
    k, v = k.copy(), v.copy()
    k[0, 0, 10, 3], v[0, 0, 40, 0], k[0, 2, 7::32] = np.nan, np.inf, np.nan
    packed = check(codec, k, v)
    assert packed.has_mu is not None and packed.has_mu.tolist() == [[1, 1, 0]]
    kinds = [[arrays.inspect(record)["kind"] for record in head] for head in packed.records[0]]
    assert kinds == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("length", [1, 5, 33, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_blocks_of_any_length(length, dtype):
    codec = MixKVQConfig.preset("lossless", block_length=length, residual_length=length).codec(24, dtype)
    x = ramp(2 * length + 1, 48).reshape(1, 1, -1, 48)
    k, v = narrowed(x[..., :24], dtype), narrowed(x[..., 24:], dtype)
    k[0, 0, 0, :3] = narrowed(np.array([np.nan, np.inf, -0.0], np.float32), dtype)
    check(codec, k, v, first=[1], blocks=[2])
    check(codec, np.ascontiguousarray(k), np.ascontiguousarray(v))


# ---- budgets -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("allocate", ["budget", "layer"])
@pytest.mark.parametrize("cost", ["model", "measured"])
def test_budgets(allocate, cost):
    codec = codec_of(32, block_length=32, residual_length=32, key_group_size=32, pattern_cost=cost, key_range="minmax",
                     value_range="minmax")  # fmt: skip
    k, v = (ramp(96, 96, s).reshape(1, 96, 3, 32).transpose(0, 2, 1, 3).copy() for s in (3, 4))
    weight = np.exp(np.random.default_rng(5).standard_normal((1, 3, 32))).astype(np.float32)
    k[0, 0, 5, 3], v[0, 2, 70, 3] = np.nan, np.inf
    for columns, reference in ((1, True), (3, True), (5, False), (8, True)):
        fields = {"allocate": allocate, "budget_columns": columns, "key_reference": reference}
        check(dataclasses.replace(codec, **fields), k, v, importance=weight)
    weight[0, 1, 3] = 1e25  # its square is infinite
    check(dataclasses.replace(codec, allocate=allocate, budget_columns=3), k, v, importance=weight)


@examples(12)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(3, 7))
def test_measured_errors_are_those_of_the_core_to_the_last_bit(seed, tier, columns):
    """Channels hold the same numbers in another order: their errors differ by roundings, which decide who gets bits."""
    rng = np.random.default_rng(seed)
    levels = 2 ** (tier + 1) - 1
    scale = np.float32(2.0 ** rng.integers(-8, 5) * (1 + rng.integers(0, 8) / 8))
    codes = rng.integers(0, levels, 32) + np.float32(0.5)
    column = (codes.astype(np.float32) * scale).view(np.int32) + rng.integers(-2, 3, 32).astype(np.int32)
    column = column.view(np.float32)
    column[:2] = 0, np.float32(levels) * scale
    k = np.ascontiguousarray(np.stack([rng.permutation(column) for _ in range(64)], axis=1))[None, None]
    codec = codec_of(64, block_length=32, residual_length=32, key_group_size=32, pattern_cost="measured",
                     key_reference="none", value_range="minmax")  # fmt: skip
    check(dataclasses.replace(codec, allocate="budget", budget_columns=columns), k, ramp(32, 64)[None, None])


# ---- golden records ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes(name):
    codec, k, v, weight = make.case(name)
    packed = emulator.pack(codec, k[None], v[None], importance=weight[None])
    expected, expected_mu = stored(name)
    assert packed.records[0] == expected
    assert packed.raised[0].reshape(-1).tolist() == FACTS[name]["raised"]
    for head, want in enumerate(expected_mu):
        if want is not None:
            assert packed.has_mu is not None and packed.mu is not None and packed.has_mu[0, head] == 1
            assert (packed.mu[0, head].view(np.uint16) == want.view(np.uint16)).all()


# ---- what is refused -----------------------------------------------------------------------------------------------
def test_arguments_are_checked():
    codec = codec_of(16)
    k = np.zeros((1, 1, 128, 16), np.float32)
    with pytest.raises(ValueError, match="v is 2, must be of the codec's dtype"):
        emulator.pack(codec, k, k.astype(np.float16))
    with pytest.raises(ValueError, match="k is 8, must be of the codec's head_dim"):
        emulator.pack(codec, k[..., :8], k[..., :8])
