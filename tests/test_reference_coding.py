"""The oracle's coding of groups and choice of tiers, against facts worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import codec_of, ramp

from mixkvq import reference
from mixkvq.reference import coding, tiers

F32 = np.float32


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("metadata", ["e5m3", "fp16"])
def test_minmax_error_is_half_a_step_plus_what_the_metadata_lose(bits, metadata):
    x = ramp(64, 40)
    coded = coding.code_groups(x, bits, "minmax", metadata)
    miss = np.abs(coding.values_of(coded.codes, coded.scale, coded.offset) - x).max(axis=0)
    step = coded.scale
    # the stored range can miss either end: offset off by half its unit, scale rounded by 1/16 (e5m3) or 2^-11 (fp16)
    if metadata == "e5m3":
        slack = coding.unit_of(step, bits) / 2 + (2**bits - 1) * step / 15
    else:
        slack = np.full_like(step, 2.0**-9) + (2**bits - 1) * step * 2.0**-10
    assert (miss <= step / 2 + slack + 1e-6).all()
    assert coded.fits.all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_minmax_with_exact_metadata_errs_by_at_most_half_a_step(bits):
    """Range and minimum that e5m3 and int8 hold exactly: nothing but the rounding of codes is left."""
    levels = 2**bits - 1
    x = (ramp(64, 24) + 4) / 8
    x[0], x[1] = 0, 1
    x = (x * levels).astype(F32)  # scale 1, offset 0
    coded = coding.code_groups(x, bits, "minmax", "e5m3")
    assert (coded.scale == 1).all()
    assert (coded.offset == 0).all()
    assert np.abs(coded.codes.astype(F32) - x).max() <= 0.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_search_is_never_worse_than_its_first_ratio(bits):
    x = (ramp(64, 40) / 4) ** 3
    wide = coding.code_groups(x, bits, "minmax", "fp16")
    best = coding.code_groups(x, bits, "search", "fp16")
    assert (best.error <= wide.error * 1.01).all()
    if bits < 8:
        assert best.error.sum() < 0.95 * wide.error.sum()


def test_codes_round_half_to_even():
    x = np.zeros((8, 1), F32)
    x[:, 0] = [0, 0.5, 1.5, 2.5, 3, 2.49, 0.51, 1]
    coded = coding.code_groups(x, 2, "minmax", "fp16")
    assert coded.codes[:, 0].tolist() == [0, 0, 2, 2, 3, 2, 1, 1]


def test_constant_group_raises_the_scale_until_the_offset_fits():
    x = np.full((8, 1), 100, F32)
    coded = coding.code_groups(x, 2, "minmax", "e5m3")
    # unit = scale / 4 and 127 units must reach 100: scale >= 3.1496, the next e5m3 value is 3.25
    assert coded.scale[0] == 3.25
    assert coded.raised[0]
    assert coded.offset[0] == F32(123 * 0.8125)
    value = coding.values_of(coded.codes, coded.scale, coded.offset)
    assert np.abs(value - 100).max() <= 0.4


def test_largest_offset_that_int8_holds():
    # at 240 and 8 bits the unit is 960: 127 units are 121920; half a unit more rounds to 128 and does not fit
    fits = coding.code_groups(np.array([[121920.0, 122399.0, 122400.0, 122401.0]] * 8, F32), 8, "minmax", "e5m3").fits
    assert fits.tolist() == [True, True, False, False]


def test_largest_scale():
    x = np.zeros((8, 3), F32)
    x[1] = [720, np.nextafter(F32(720), F32(721)), 700]
    coded = coding.code_groups(x, 2, "minmax", "e5m3")
    assert coded.fits.tolist() == [True, False, True]


def test_fp16_metadata_limits():
    x = np.zeros((8, 4), F32)
    x[1] = [65504 * 3, 65520 * 3, 2.0**-30, 0]
    coded = coding.code_groups(x, 2, "minmax", "fp16")
    assert coded.fits.tolist() == [True, False, True, True]
    assert coded.scale[2:].tolist() == [2.0**-24, 2.0**-24]
    constant = coding.code_groups(np.full((8, 1), 1000.3, F32), 2, "minmax", "fp16")
    assert (constant.codes == 0).all()
    assert constant.offset[0] == 1000.5


def test_negative_zero_minimum_is_stored_as_plus_zero():
    x = np.full((8, 1), -0.0, F32)
    for metadata in ("e5m3", "fp16"):
        for rule in ("minmax", "search"):
            assert coding.code_groups(x, 2, rule, metadata).raw_offset.tobytes() in (b"\0", b"\0\0")


def test_channels_rank_by_score_and_ties_take_the_lower_index_first():
    score = np.array([1, 3, 3, 2, 0, 3, 1, 0], F32)
    assert tiers.assign(score, (2, 2, 1, 1, 1, 1)).tolist() == [1, 5, 4, 2, 0, 3, 1, 0]


def test_thresholds_are_strict():
    codec = codec_of(8, allocate="threshold", thresholds=(2.0, 1.0), key_reference="none")
    x = np.zeros((32, 8), F32)
    # S = 1, 2, 2+, 1+, 0, 3, 1/3, 1
    x[0] = [3, 6, np.nextafter(F32(6), F32(7)), np.nextafter(F32(3), F32(4)), 0, 9, 1, 3]
    ones = np.ones(8, F32)
    assert tiers.choose_tiers(codec, x, ones).tolist() == [1, 3, 5, 3, 1, 5, 1, 1]
    assert tiers.choose_tiers(codec, x, 2 * ones).tolist() == [3, 5, 5, 5, 1, 5, 1, 3]


def test_cheapest_pattern_wins_and_the_first_of_equals():
    flat = np.tile(np.array([[0.0], [1.0]], F32), (16, 8))  # all channels alike: variance 1/4
    ones = np.ones(8, F32)
    # two channels at 4 and six at 2 bits cost 6 * .118 + 2 * .0115; all at 3 bits 8 * .035: the second is cheaper
    codec = codec_of(64, key_patterns=({4: 16, 2: 48}, {3: 64}, {3: 64}))
    wide = np.tile(flat, (1, 8))
    assert set(tiers.choose_tiers(codec, wide, np.ones(64, F32)).tolist()) == {2}
    one_strong = np.where(np.arange(64) < 16, F32(10), F32(0.1))
    assert tiers.choose_tiers(codec, wide, one_strong).tolist() == [3] * 16 + [1] * 48
    same = codec_of(8, key_patterns=({4: 64}, {4: 64}))
    assert tiers.choose_tiers(same, flat, ones).tolist() == [3] * 8


def test_measured_cost_skips_what_does_not_fit():
    menu = ({2: 64}, {8: 64})
    codec = codec_of(8, pattern_cost="measured", key_patterns=menu, key_reference="none", key_range="minmax")
    x = ramp(128, 8)
    x[0, 3] = 2000  # 2-bit scale 668 > 240, 8-bit scale 7.9
    assert tiers.choose_tiers(codec, x, np.zeros(8, F32)).tolist() == [4] * 8
    x[0, 3] = 1e6
    assert tiers.choose_tiers(codec, x, np.zeros(8, F32)) is None
    record, _, _ = reference.pack_block(codec, x, ramp(128, 8))
    assert reference.parse(record).exact
