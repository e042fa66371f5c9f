"""What the core refuses: the message names the argument, its value and what is allowed, and nothing is written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from inputs import codec_of, ramp

from mixkvq import reference

pytest.importorskip("mixkvq._core", reason="the C core is not built")
from mixkvq import arrays

CODEC = codec_of(16, block_length=32, residual_length=32, key_group_size=32)
K = ramp(64, 16)[None, None]
ONE = np.ones((1, 1, 16), np.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_dim", 20),
        ("head_dim", 264),
        ("block_length", 48),
        ("block_length", 2048),
        ("key_group", 24),
        ("key_group", 12),
        ("value_bits", 5),
        ("value_group", 12),
        ("value_group", 24),
        ("patterns", ()),
        ("patterns", ((0, 15, 0, 0, 0, 0),)),
        ("patterns", ((0, 16, 0, 0, 0, 0),) * 17),
    ],
)
def test_codec_fields(field, value):
    with pytest.raises(ValueError, match=field.rstrip("s")):
        arrays.core_codec(dataclasses.replace(CODEC, **{field: value}))


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ((1.0, 2.0), 1),
        ((1.0, -0.5), 1),
        ((float("nan"), 0.0), 0),
        ((1.0, float("nan")), 1),
        ((-1e30, 0.0), -(2**63)),
        ((1e30, float("inf")), 2**63 - 1),
    ],
)
def test_thresholds(pair, value):
    """The error tells a number as an integer, NaN as 0."""
    codec = dataclasses.replace(CODEC, allocate="threshold", threshold_high=pair[0], threshold_low=pair[1])
    with pytest.raises(ValueError, match=f"threshold_high is {value},"):
        arrays.core_codec(codec)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("v", {"v": K[:, :, :63]}),
        ("v", {"v": K.astype(np.float16)}),
        ("k", {"k": K.astype(np.float16), "v": K.astype(np.float16)}),
        ("k", {"k": K[..., :8], "v": K[..., :8]}),
        ("first", {"first": [-1]}),
        ("first", {"first": [1], "blocks": [2]}),
        ("blocks", {"k": np.repeat(K, 2, 0), "v": np.repeat(K, 2, 0), "blocks": [1, -1]}),
        ("importance", {"importance": -ONE}),
        ("importance", {"importance": ONE * np.float32(np.nan)}),
        ("importance", {"importance": ONE * np.float32(np.inf)}),
        ("importance", {"importance": ONE[..., :8]}),
        ("first is of dtype float64, must be of whole numbers", {"first": [0.9]}),
        ("blocks is of dtype <U1, must be of whole numbers", {"blocks": ["1"]}),
        ("mu is of dtype float32, must be float16 or uint16", {"mu": ONE}),
        ("has_mu is of dtype float64, must be uint8", {"has_mu": [[0.0]]}),
    ],
)
def test_pack_arguments(name, change):
    arguments = {"k": K, "v": K, **change}
    with pytest.raises(ValueError, match=name):
        arrays.pack(CODEC, **arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": np.zeros((1, 2, 3, 8), np.float32)}),
        ("q", {"q": np.zeros((2, 2, 3, 16), np.float32)}),
        ("v", {"v": K[:, :, :60]}),
        ("exact", {"exact": [65]}),
        ("exact", {"exact": [-1]}),
        ("exact is of dtype float64, must be of whole numbers", {"exact": [3.9]}),
        ("mu is of dtype float64, must be float16 or uint16", {"mu": [[[0.0] * 16]]}),
        ("exact", {"exact": [3], "sink_length": 4}),
        ("sink_length", {"sink_length": -1}),
        ("start", {"start": [-1]}),
        ("mask", {"mask": np.ones((1, 1, 3, 127), bool)}),
        ("mask", {"mask": np.ones((1, 1, 3, 128), bool), "start": [1]}),
        ("sink_logits", {"sink_logits": [1.0]}),
        ("softcap", {"softcap": -1.0}),
        ("softcap", {"softcap": float("nan")}),
        ("scaling", {"scaling": float("nan")}),
        ("mu", {"mu": None}),
    ],
)
def test_attend_arguments(name, change):
    records, mu, _ = reference.pack_head(CODEC, K[0, 0], K[0, 0])
    arguments = {"q": np.zeros((1, 2, 3, 16), np.float32), "records": [[records]], "k": K, "v": K, "exact": [64],
                 "mu": mu[None, None]}  # fmt: skip
    arrays.attend(**arguments)
    with pytest.raises(ValueError, match=name):
        arrays.attend(**{**arguments, **change})


def test_references_of_any_byte_order_and_layout_are_the_same():
    """And any number but 0 says that there is one."""
    first = arrays.pack(CODEC, K, K)
    assert first.mu is not None and first.has_mu is not None
    again = arrays.pack(CODEC, K, K, mu=first.mu, has_mu=first.has_mu)
    wide = np.repeat(first.mu.astype(">f2"), 2, -1)[..., ::2]
    for mu in (first.mu.astype(">f2"), first.mu.view(np.uint16).astype(">u2"), wide):
        other = arrays.pack(CODEC, K, K, mu=mu, has_mu=first.has_mu.astype(np.int64) * 256)
        assert other.records == again.records and other.mu.dtype == np.float16
        assert np.array_equal(other.mu, first.mu)
        keys, _ = arrays.unpack(again.records[0][0][0], mu=mu[0, 0])
        assert np.array_equal(keys, arrays.unpack(again.records[0][0][0], mu=first.mu[0, 0])[0])


def test_query_heads_must_be_a_multiple_of_the_kv_heads():
    window = np.zeros((1, 2, 4, 16), np.float32)
    with pytest.raises(ValueError, match="q"):
        arrays.attend(np.zeros((1, 3, 1, 16), np.float32), [[[], []]], window, window, [4])
    with pytest.raises(ValueError, match=r"q|kv_heads"):
        arrays.salience(np.zeros((1, 3, 1, 16), np.float32), 2, power=2)


@pytest.mark.parametrize(
    ("name", "change"), [("power", {"power": 3}), ("kv_heads", {"kv_heads": 0}), ("first", {"first": [4]})]
)
def test_salience_arguments(name, change):
    with pytest.raises(ValueError, match=name):
        arrays.salience(**{"q": np.zeros((1, 2, 3, 16), np.float32), "kv_heads": 1, "power": 2, **change})


def test_damaged_records_are_refused_everywhere():
    records, mu, _ = reference.pack_head(CODEC, K[0, 0], K[0, 0])
    damage = (
        (0, 0, "not a MixKVQ record"),
        (4, 2, "version"),
        (20, 64, "nbytes"),
        (7, 5, "value_bits"),
        (10, 128, "nbytes"),
    )
    for at, value, name in damage:
        bad = bytearray(records[1])
        bad[at] = value
        with pytest.raises(ValueError, match=name):
            arrays.inspect(bytes(bad))
        with pytest.raises(ValueError, match=name):
            arrays.unpack(bytes(bad), mu=mu)
        with pytest.raises(ValueError, match=name):
            arrays.attend(np.zeros((1, 1, 1, 16), np.float32), [[[bytes(bad)]]], K, K, [64], mu=mu[None, None])
    with pytest.raises(ValueError, match="64 bytes"):
        arrays.inspect(b"MKVQ")


@pytest.mark.parametrize("shape", [(1 << 24, 1 << 24, 4, 16), (1, 1, (1 << 44) + 1, 16)])
def test_sizes_beyond_what_can_be_addressed(shape):
    """A stride of 0 makes any size of no memory."""
    huge = np.lib.stride_tricks.as_strided(np.zeros(16, np.float32), shape, (0, 0, 0, 4))
    with pytest.raises(ValueError, match=r"q.*2\^48 elements"):
        arrays.salience(huge, 1, power=2)
