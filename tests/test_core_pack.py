"""Packing, unpacking and inspection: the C core against the oracle, byte for byte, on every instruction set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from core_cases import DTYPES, HEAD_DIMS, TROUBLES, codecs, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st
from inputs import beside_ties, codec_of, ramp

from mixkvq import list_presets, reference
from mixkvq.config import BlockCodec, MixKVQConfig
from mixkvq.reference import layout, numbers

pytest_plugins = ["core_fixtures"]


def bits(x):
    """Bit patterns, so that -0.0 differs from 0.0; every NaN is the same."""
    x = np.ascontiguousarray(x)
    integer = x.view(f"u{x.itemsize}")
    return np.where(np.isnan(x), integer.dtype.type(1), integer) if x.dtype.kind == "f" else integer


def check_pack(codec: BlockCodec, k, v, first, blocks, importance, mu=None, has_mu=None):
    """Pack with the core; every record, reference and count must be the oracle's."""
    from mixkvq import arrays

    packed = arrays.pack(codec, k, v, first=first, blocks=blocks, importance=importance, mu=mu, has_mu=has_mu)
    for b in range(k.shape[0]):
        part = slice(int(first[b]), int(first[b] + blocks[b] * codec.block_length))
        known = [has_mu is not None and has_mu[b, h] for h in range(k.shape[1])]
        old = [mu[b, h].view(np.float16) if known[h] else None for h in range(k.shape[1])]
        weight = None if importance is None else importance[b]
        row = reference.pack_heads(codec, k[b, :, part], v[b, :, part], weight, old)
        for h, (records, new, raised) in enumerate(zip(*row, strict=True)):
            assert len(packed.records[b][h]) == len(records)
            for got, expected in zip(packed.records[b][h], records, strict=True):
                assert got == expected, difference(got, expected)
            assert packed.raised[b, h, : len(raised)].tolist() == raised
            if codec.key_reference:
                assert bool(packed.has_mu[b, h]) == (new is not None)
                assert new is None or (packed.mu[b, h].view(np.uint16) == new.view(np.uint16)).all()
            for record in records:
                check_unpack(record, new)
    return packed


def check_unpack(record: bytes, mu):
    from mixkvq import arrays

    expected = reference.unpack(record, mu)
    for dtype in DTYPES:
        got = arrays.unpack(record, mu=mu, dtype=dtype)
        for mine, theirs in zip(got, expected, strict=True):
            assert (bits(mine) == bits(numbers.narrow(theirs, dtype))).all() or same_bfloat16(mine, theirs, dtype)


def same_bfloat16(mine, theirs, dtype):
    """NaN payloads of bfloat16 patterns are free."""
    wide = numbers.widen(mine, dtype) if dtype == "bfloat16" else mine
    back = numbers.widen(numbers.narrow(theirs, dtype), dtype)
    return dtype == "bfloat16" and bool((bits(wide) == bits(back)).all())


def difference(got: bytes, expected: bytes) -> str:
    if len(got) != len(expected):
        return f"length {len(got)}, expected {len(expected)}; {reference.parse(got)} / {reference.parse(expected)}"
    at = [i for i, (x, y) in enumerate(zip(got, expected, strict=True)) if x != y]
    return f"{len(at)} bytes differ, first {at[:8]}: {[got[i] for i in at[:8]]} for {[expected[i] for i in at[:8]]}"


def random_pack(seed: int, codec: BlockCodec, heads: int, blocks: int, troubles: list[str], poison: bool) -> None:
    """Random contents, strides, starts and block counts; the second call goes on with the first one's state."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 3))
    tokens = blocks * codec.block_length + int(rng.integers(0, 20))
    shape = (batch, heads, tokens, codec.head_dim)
    along = int(rng.integers(2, 4))
    k, v = fill(rng, shape, troubles, 2), fill(rng, shape, troubles, along)
    if poison:
        for x in (k, v)[: rng.integers(1, 3)]:
            x[tuple(rng.integers(size) for size in shape)] = rng.choice([np.nan, np.inf, -np.inf])
    k, v = strided(rng, narrowed(k, codec.dtype)), strided(rng, narrowed(v, codec.dtype))
    count = rng.integers(0 if batch > 1 else 1, blocks + 1, batch)
    first = np.array([rng.integers(0, tokens - n * codec.block_length + 1) for n in count], np.int64)
    weight = [
        None,
        np.exp(rng.standard_normal((batch, heads, codec.head_dim))).astype(np.float32),
        rng.integers(0, 3, (batch, heads, codec.head_dim)).astype(np.float32),
    ][rng.integers(3)]
    packed = check_pack(codec, k, v, first, count.astype(np.int64), weight)
    if codec.key_reference:
        zeros = np.zeros(batch, np.int64)
        check_pack(codec, k, v, zeros, zeros + 1, weight, packed.mu, packed.has_mu)


@examples(200)
@given(
    st.integers(0, 2**32),
    codecs(lengths=(32, 64)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.sampled_from(TROUBLES), max_size=3),
    st.integers(0, 3).map(lambda n: n == 0),
)
def test_records_equal_the_oracle(isa, seed, codec, heads, blocks, troubles, poison):
    random_pack(seed, codec, heads, blocks, troubles, poison)


@pytest.mark.exhaustive
@pytest.mark.slow
@examples(3000, fixed=False)
@given(
    st.integers(0, 2**32),
    codecs(lengths=(32, 64, 96, 128, 160, 256)),
    st.integers(1, 8),
    st.integers(1, 4),
    st.lists(st.sampled_from(TROUBLES), max_size=5),
    st.booleans(),
)
def test_records_equal_the_oracle_at_length(isa, seed, codec, heads, blocks, troubles, poison):
    random_pack(seed, codec, heads, blocks, troubles, poison)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", list_presets())
def test_presets_equal_the_oracle(isa, preset, head_dim):
    codec = codec_of(head_dim, DTYPES[head_dim // 8 % 3], preset)
    rng = np.random.default_rng(head_dim)
    k, v = (narrowed(fill(rng, (1, 2, 256, head_dim), ["integers"], 2), codec.dtype) for _ in range(2))
    check_pack(codec, k, v, np.zeros(1, np.int64), np.full(1, 2), np.ones((1, 2, head_dim), np.float32))


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("metadata", ["e5m3", "fp16"])
@pytest.mark.parametrize("rule", ["minmax", "search"])
def test_unusual_channels_equal_the_oracle(isa, trouble, metadata, rule):
    """Every width meets every unusual channel, in keys and in values."""
    for reference_, width in (("none", 1), ("static", 2), ("none", 3), ("none", 4), ("none", 8)):
        codec = codec_of(8, block_length=32, residual_length=32, key_group_size=32, key_range=rule, value_range=rule,
                         key_metadata=metadata, value_metadata=metadata, value_basis="identity", value_bits=width,
                         key_reference=reference_, key_patterns=({width: 64},))  # fmt: skip
        rng = np.random.default_rng(width)
        for along, twin in ((2, 3), (3, 2)):
            k, v = (narrowed(fill(rng, (1, 3, 32, 8), [trouble] * 2, axis), "float32") for axis in (along, twin))
            check_pack(codec, k, v, np.zeros(1, np.int64), np.ones(1, np.int64), None)


@examples(40)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(["e5m3", "fp16"]))
def test_ties_of_codes_and_scales_equal_the_oracle(isa, seed, width, metadata):
    """Values on a grid of half steps around powers of two: rounding ties in scale, offset, code and error."""
    rng = np.random.default_rng(seed)
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32, key_reference="none",
                     value_basis="identity", key_metadata=metadata, value_metadata=metadata, value_bits=width,
                     value_group_size=8, key_patterns=({width: 64},))  # fmt: skip
    scale = 2.0 ** rng.integers(-30, 8, (1, 2, 1, 16))
    k, v = (
        (rng.integers(-17, 18, (1, 2, 32, 16)) * scale * rng.choice([0.5, 1, 1.0625])).astype(np.float32) for _ in "kv"
    )
    check_pack(codec, k, v, np.zeros(1, np.int64), np.ones(1, np.int64), None)


@examples(150)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4]))
def test_quotients_beside_a_rounding_tie_equal_the_oracle(isa, seed, width):
    """Elements within a few units in the last place of half a step, for scales whose reciprocal is not exact."""
    check_pack(*beside_ties(seed, width, 64), np.zeros(1, np.int64), np.ones(1, np.int64), None)


@pytest.mark.parametrize("cost", ["model", "measured"])
@pytest.mark.parametrize("allocate", ["patterns", "threshold"])
def test_ties_between_channels_equal_the_oracle(isa, cost, allocate):
    """Many channels with the same A, and patterns with the same cost."""
    menu = ((4, 4, 4, 2, 1, 1), (4, 4, 4, 2, 1, 1), (0, 8, 8, 0, 0, 0), (8, 0, 0, 8, 0, 0), (16, 0, 0, 0, 0, 0))
    codec = codec_of(16, block_length=64, residual_length=64, key_group_size=32, pattern_cost=cost, allocate=allocate)
    codec = dataclasses.replace(codec, patterns=menu)
    column = ramp(64, 4)
    for order in ([0] * 16, [0, 1] * 8, [0, 1, 2, 3] * 4, [3] * 5 + [0] * 11):
        k = np.ascontiguousarray(column[:, order])[None, None]
        for weight in (1, 0, 2.5):
            importance = np.full((1, 1, 16), weight, np.float32)
            check_pack(codec, k, k, np.zeros(1, np.int64), np.ones(1, np.int64), importance)


@pytest.mark.parametrize("length", [1, 5, 33, 128, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_blocks_of_any_length_equal_the_oracle(isa, length, dtype):
    codec = MixKVQConfig.preset("lossless", block_length=length, residual_length=length).codec(24, dtype)
    x = ramp(2 * length + 1, 48).reshape(1, 1, -1, 48)
    k, v = narrowed(x[..., :24], dtype), narrowed(x[..., 24:], dtype)
    k[0, 0, 0, :3] = narrowed(np.array([np.nan, np.inf, -0.0], np.float32), dtype)
    check_pack(codec, k, v, np.ones(1, np.int64), np.full(1, 2), None)


def test_longest_coded_block_equals_the_oracle(isa):
    codec = codec_of(16, "float16", block_length=1024, residual_length=1024, key_group_size=128)
    k, v = (narrowed(ramp(1024, 16, seed)[None, None], "float16") for seed in (1, 2))
    check_pack(codec, k, v, np.zeros(1, np.int64), np.ones(1, np.int64), None)


@examples(60)
@given(st.integers(0, 2**32), codecs(head_dims=(8, 24, 64), lengths=(32,)), st.data())
def test_inspect_agrees_with_the_oracle(isa, seed, codec, data):
    """Fields of sound records, and refusal of records with a damaged header or map, or cut short."""
    from mixkvq import arrays

    k = fill(np.random.default_rng(seed), (1, 1, 32, codec.head_dim), [], 2)[0, 0]
    record, _, _ = reference.pack_block(codec, narrowed(k, codec.dtype), narrowed(k, codec.dtype))
    header, info = reference.parse(record), arrays.inspect(record)
    names = (
        "value_bits",
        "head_dim",
        "tokens",
        "key_group",
        "value_group",
        "key_reference",
        "value_rotation",
        "nbytes",
    )
    for name in names:
        assert info[name] == getattr(header, name), name
    assert list(info["channels"]) == list(header.counts)
    assert list(info["tier"])[: codec.head_dim] == list(header.tiers)
    assert info["metadata_bytes"] + info["code_bytes"] <= info["nbytes"]
    at = data.draw(st.integers(0, 32 + 3 * codec.head_dim // 8 - 1))
    bad = bytearray(record)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    cut = bytes(bad)[: data.draw(st.sampled_from([len(record), len(record) - 1, 40]))]
    try:
        expected = reference.parse(cut)
    except ValueError:
        with pytest.raises(ValueError):
            arrays.inspect(cut)
    else:
        assert list(arrays.inspect(cut)["channels"]) == list(expected.counts)


def test_sections_add_up(isa):
    """metadata_bytes and code_bytes of inspect are those of docs/format.md section 6."""
    from mixkvq import arrays

    codec = codec_of(64)
    record, _, _ = reference.pack_block(codec, ramp(128, 64), ramp(128, 64, 1))
    info, counts = arrays.inspect(record), reference.parse(record).counts
    assert info["metadata_bytes"] == 2 * 2 * 64 + 2 * 128
    assert info["code_bytes"] == 4 * 128 * sum(layout.column_counts(counts)) + 4 * 64 * (8 + 4)
    assert info["nbytes"] == 6720


@pytest.mark.parametrize("tokens", [[5], list(range(32))])
@pytest.mark.parametrize("signs", [1, -1])
@pytest.mark.parametrize("metadata", ["e5m3", "fp16"])
@pytest.mark.parametrize("rule", ["minmax", "search"])
def test_values_that_overflow_in_the_rotation_make_the_block_exact(isa, tokens, signs, metadata, rule):
    """The butterflies give inf, then inf - inf: a NaN must not hide from the minimum and maximum of its group."""
    from mixkvq import arrays

    for head_dim, width in ((8, 1), (24, 3), (64, 8)):
        codec = codec_of(head_dim, block_length=32, residual_length=32, key_group_size=32, value_bits=width,
                         value_range=rule, value_metadata=metadata)  # fmt: skip
        k, v = ramp(32, head_dim)[None, None], ramp(32, head_dim, 1)[None, None]
        v[0, 0, tokens] = 3e38 * np.float32(signs) ** np.arange(head_dim, dtype=np.float32)
        assert reference.parse(arrays.pack(codec, k, v).records[0][0][0]).exact
        check_pack(codec, k, v, np.zeros(1, np.int64), np.ones(1, np.int64), None)


@pytest.mark.parametrize("cost", ["model", "measured"])
@pytest.mark.parametrize("allocate", ["patterns", "threshold"])
def test_ranges_that_overflow_equal_the_oracle(isa, cost, allocate):
    """S is infinite; with I = 0 the score of such a channel is not a number, and it ranks before all."""
    menu = ((2, 2, 2, 0, 0, 2), (0, 4, 0, 0, 1, 3), (1, 1, 1, 1, 4, 0))
    codec = codec_of(8, block_length=32, residual_length=32, key_group_size=32, key_reference="none", pattern_cost=cost,
                     allocate=allocate)  # fmt: skip
    codec, exact = dataclasses.replace(codec, patterns=menu), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        k, v = ramp(32, 8, seed)[None, None], ramp(32, 8, seed + 50)[None, None]
        for channel in rng.choice(8, rng.integers(1, 4), replace=False):
            k[0, 0, :, channel] = rng.choice([-1, 1], 32) * rng.choice([3.3e38, 1e30, 1e20])
        weight = rng.integers(0, 2, (1, 1, 8)).astype(np.float32)
        packed = check_pack(codec, k, v, np.zeros(1, np.int64), np.ones(1, np.int64), weight)
        exact += reference.parse(packed.records[0][0][0]).exact
    assert 0 < exact < 40
