"""The oracle's records, salience and attention, against facts worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import codec_of, ramp

from mixkvq import reference
from mixkvq.config import MixKVQConfig
from mixkvq.reference import layout, numbers

F32 = np.float32


@pytest.mark.parametrize(("preset", "nbytes"), [("compact", 5056), ("default", 6720), ("kivi-2", 6208)])
def test_record_sizes_of_the_presets(preset, nbytes):
    codec = codec_of(64, "float32", preset)
    assert {reference.record_nbytes(codec, counts) for counts in codec.patterns} == {nbytes}
    k = ramp(128, 64)
    record, _, _ = reference.pack_block(codec, k, k)
    assert len(record) == nbytes
    assert reference.parse(record).nbytes == nbytes


@pytest.mark.parametrize(
    ("preset", "dim", "bits"),
    [("compact", 64, 2.48), ("default", 64, 3.29), ("compact", 128, 2.41), ("default", 128, 3.22)],
)
def test_true_bits_of_the_presets(preset, dim, bits):
    codec = codec_of(dim, "bfloat16", preset)
    for counts in codec.patterns:
        assert 8 * reference.record_nbytes(codec, counts) / (2 * 128 * dim) <= bits


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_exact_record_is_header_and_the_values(dtype, item):
    codec = MixKVQConfig.preset("lossless", block_length=5, residual_length=5).codec(24, dtype)
    k = np.arange(120).reshape(5, 24).astype(numbers.STORAGE[dtype])
    record, mu, raised = reference.pack_block(codec, k, k + np.ones((), k.dtype))
    assert len(record) == -(-(64 + 2 * 120 * item) // 64) * 64 == reference.record_nbytes(codec)
    assert record[64 : 64 + 120 * item] == k.tobytes()
    assert record[64 + 120 * item : 64 + 240 * item] == (k + np.ones((), k.dtype)).tobytes()
    assert (mu, raised) == (None, 0)
    assert (reference.unpack(record)[0] == numbers.widen(k, dtype)).all()


def test_reference_is_the_first_block_mean_and_is_added_back():
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32)
    k = ramp(64, 16)
    k[:, 3] += 500
    records, mu, _ = reference.pack_head(codec, k, k)
    assert mu.dtype == np.float16
    assert np.abs(mu.astype(np.float64) - k[:32].mean(axis=0)).max() < 0.3
    assert mu[3] == np.float16(k[:32, 3].astype(np.float64).mean())
    again, kept, _ = reference.pack_block(codec, k[32:], k[32:], mu=mu)
    assert again == records[1]
    assert kept is mu
    rms = np.sqrt(np.mean((reference.unpack(records[1], mu)[0][:, 3] - k[32:, 3]) ** 2))
    assert rms < 2  # a 2-bit code of a range of 8, not of 500
    with pytest.raises(ValueError, match="mu is None"):
        reference.unpack(records[0])


def test_an_exact_block_does_not_set_the_reference():
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32)
    k = ramp(96, 16)
    v = ramp(96, 16)
    v[5, 5] = np.nan
    records, mu, raised = reference.pack_head(codec, k, v)
    assert [reference.parse(r).exact for r in records] == [True, False, False]
    assert (mu == reference.pack_block(codec, k[32:64], v[32:64])[1]).all()
    assert raised == [0, 0, 0]
    for bad in (np.inf, -np.inf, np.nan):
        k2 = ramp(32, 16)
        k2[31, 15] = bad
        assert reference.parse(reference.pack_block(codec, k2, ramp(32, 16))[0]).exact


def test_a_mean_beyond_float16_makes_the_block_exact():
    codec = codec_of(8, block_length=32, residual_length=32, key_group_size=32)
    k = np.full((32, 8), 65504, F32)
    assert not reference.parse(reference.pack_block(codec, k, ramp(32, 8))[0]).exact
    k[:, 2] = 65520
    record, mu, _ = reference.pack_block(codec, k, ramp(32, 8))
    assert reference.parse(record).exact
    assert mu is None


def test_raised_scales_are_counted_over_keys_and_values():
    codec = codec_of(
        8,
        key_patterns=({2: 64},),
        key_reference="none",
        key_range="minmax",
        value_basis="identity",
        value_range="minmax",
        value_bits=2,
        block_length=64,
        residual_length=64,
        key_group_size=32,
    )
    k, v = ramp(64, 8), ramp(64, 8)
    k[:, 1] = 100  # two key groups
    v[7] = 50  # one value token
    _, _, raised = reference.pack_block(codec, k, v)
    assert raised == 3


def test_exact_channels_are_bit_for_bit_and_not_relative():
    codec = codec_of(
        8,
        "bfloat16",
        allocate="threshold",
        thresholds=(0.5, 0.1),
        block_length=32,
        residual_length=32,
        key_group_size=32,
    )
    k = numbers.narrow(ramp(32, 8), "bfloat16")
    k[:, 2:] = numbers.narrow(ramp(32, 6) / 100, "bfloat16")
    record, mu, _ = reference.pack_block(codec, k, k)
    header = reference.parse(record)
    assert header.tiers == (5, 5, 1, 1, 1, 1, 1, 1)
    sections = layout.codec_sections(codec, header.counts)
    assert record[sections.exact_keys : sections.exact_keys + 128] == k[:, :2].T.tobytes()
    assert (reference.unpack(record, mu)[0][:, :2] == numbers.widen(k[:, :2], "bfloat16")).all()


def test_short_last_value_group():
    codec = codec_of(24, preset="kivi-2", value_group_size=16, block_length=32, residual_length=32)
    v = ramp(32, 24)
    v[:, 16:] = ramp(32, 8) / 100
    record, _, _ = reference.pack_block(codec, ramp(32, 24), v)
    miss = np.abs(reference.unpack(record)[1] - v)
    assert miss[:, :16].max() < 8 / 6 + 0.05
    assert miss[:, 16:].max() < 0.08 / 6 + 0.0005


def test_parse_refuses_damaged_records():
    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32)
    record, _, _ = reference.pack_block(codec, ramp(32, 16), ramp(32, 16))
    damage = {
        "magic": (0, 0),
        "version": (4, 2),
        "kind": (5, 2),
        "dtype": (6, 4),
        "value_bits": (7, 5),
        "head_dim": (8, 20),
        "tokens": (10, 33),
        "key_group": (12, 24),
        "value_group": (14, 24),
        "metadata": (16, 2),
        "flags": (17, 4),
        "channel map": (32, 0xFF),
    }
    for name, (at, value) in damage.items():
        bad = bytearray(record)
        bad[at] = value
        with pytest.raises(ValueError, match=name):
            reference.parse(bytes(bad))
    for at, value in ((7, 2), (20, 64), (12, 8), (16, 0x11)):
        bad = bytearray(record)
        bad[at] = value
        with pytest.raises(ValueError, match="nbytes"):
            reference.parse(bytes(bad))
    for length in (0, 20, 63, len(record) - 64):
        with pytest.raises(ValueError, match="record"):
            reference.parse(record[:length])


def test_salience_and_importance_by_hand():
    q = np.zeros((4, 3, 8), F32)
    q[:, :, 0] = [[1, 2, 3], [-4, 5, 6], [7, 8, 9], [1, 1, -1]]
    assert reference.salience(q, 2, 1)[:, 0].tolist() == [21, 27]
    assert reference.salience(q, 2, 2, first=1)[:, 0].tolist() == [4 + 9 + 25 + 36, 64 + 81 + 2]
    total = np.array([[8.0, 18.0]])
    assert reference.importance(total, 2, 2).tolist() == [[2, 3]]
    assert reference.importance(total, 2, 1).tolist() == [[4, 9]]
    assert reference.importance(total, 0, 2).tolist() == [[1, 1]]


def test_attention_equals_softmax_written_out():
    """Exact blocks of 5 tokens between two sinks and a window of three, two rows, causal, one query head per pair."""
    codec = MixKVQConfig.preset("lossless", block_length=5, residual_length=5).codec(8, "float32")
    rows = ramp(2 * 2 * 15, 8).reshape(2, 2, 15, 8) / 4
    k, v = rows, rows[..., ::-1].copy()
    q = ramp(2 * 4 * 3, 8).reshape(2, 4, 3, 8)
    records = [[reference.pack_head(codec, k[b, h, 2:12], v[b, h, 2:12])[0] for h in range(2)] for b in range(2)]
    window = np.r_[0:2, 12:15]
    out = reference.attend(
        q,
        records,
        k[:, :, window],
        v[:, :, window],
        [5, 5],
        sink_length=2,
        mask="causal",
        softcap=5.0,
        sink_logits=np.arange(4.0),
        scaling=0.5,
    )
    for b in range(2):
        for h in range(4):
            for i in range(3):
                seen = 15 - 3 + i + 1
                s = 5 * np.tanh(q[b, h, i].astype(float) @ k[b, h // 2, :seen].T.astype(float) * 0.5 / 5)
                w = np.exp(s) / (np.exp(s).sum() + np.exp(h))
                assert np.allclose(out[b, h, i], w @ v[b, h // 2, :seen].astype(float), rtol=1e-12, atol=1e-14)


def test_masks_are_indexed_by_absolute_column():
    k = ramp(2 * 6, 8).reshape(2, 1, 6, 8)
    q = np.ones((2, 1, 2, 8), F32)
    mask = np.zeros((2, 1, 2, 9), bool)
    mask[0, 0, 0, 3] = True  # row 0 starts at column 1: its token 2
    mask[1, 0, 1, 3:5] = True  # row 1 starts at column 3: its tokens 0 and 1
    none = [[[]], [[]]]
    out = reference.attend(q, none, k, k, [6, 6], start=[1, 3], mask=mask)
    assert (out[0, 0, 0] == k[0, 0, 2]).all()
    assert (out[0, 0, 1] == 0).all()
    assert (out[1, 0, 0] == 0).all()
    added = np.where(mask, F32(0), F32(-np.inf))
    assert (reference.attend(q, none, k, k, [6, 6], start=[1, 3], mask=added) == out).all()
