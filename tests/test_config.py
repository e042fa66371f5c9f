"""`MixKVQConfig`: presets, JSON, refusals, and menus scaled to other head_dims."""

from __future__ import annotations

import dataclasses
import warnings
from fractions import Fraction

import numpy as np
import pytest

from mixkvq import MixKVQConfig, list_presets, reference
from mixkvq.policy.patterns import TIER_BITS, column_count, counts_of, scale_counts, scale_menu
from mixkvq.presets import PRESETS


@pytest.mark.parametrize("name", list_presets())
def test_presets_survive_json(name):
    config = MixKVQConfig.preset(name)
    again = MixKVQConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config) and again.name == name
    assert config.replace(sink_length=9).name == "custom" and config.replace(sink_length=9).sink_length == 9


def test_a_configuration_cannot_be_changed():
    config = MixKVQConfig.preset("default")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.value_bits = 2
    with pytest.raises(TypeError):
        config.key_patterns[0][0] = (4, 64)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"value_bits": 3.0}, ValueError, "value_bits is 3.0, must be one of 1, 2, 3, 4, 8, 16"),
        ({"value_bits": True}, ValueError, "value_bits is True"),
        ({"value_bits": 5}, ValueError, "value_bits is 5"),
        ({"block_length": 48}, ValueError, "block_length is 48, must be a multiple of 32"),
        ({"block_length": 96}, ValueError, "must be a multiple of key_group_size"),
        ({"block_length": 128.0}, TypeError, "block_length is 128.0, must be an int"),
        ({"residual_length": 64}, ValueError, "residual_length is 64"),
        ({"key_patterns": {2.5: 64}}, TypeError, "key_patterns"),
        ({"key_patterns": 5}, TypeError, "key_patterns is 5"),
        ({"key_patterns": {4: 32}}, ValueError, "splits 32"),
        ({"key_patterns": ()}, ValueError, "has 0 entries"),
        ({"thresholds": (1, 2, 3)}, TypeError, "thresholds is"),
        ({"thresholds": (0.5, 1.0)}, ValueError, "high >= low"),
        ({"thresholds": (10**400, 1)}, ValueError, f"thresholds is (1{'0' * 78}, must be finite"),
        ({"thresholds": (1, -(10**400))}, ValueError, "must be finite"),
        ({"thresholds": (np.float32("inf"), 0)}, ValueError, "must be finite"),
        ({"thresholds": (float("nan"), 0)}, ValueError, "thresholds is (nan, 0), must be finite"),
        ({"thresholds": (1, np.float32("nan"))}, ValueError, "must be finite"),
        ({"thresholds": (True, False)}, TypeError, "thresholds is"),
        ({"key_budget": 0.5}, ValueError, "key_budget is 0.5, must be from 1 to 8"),
        ({"key_budget": float("nan")}, ValueError, "key_budget is nan"),
        ({"key_budget": "3"}, TypeError, "key_budget is '3', must be a number"),
        ({"key_budget": True}, TypeError, "key_budget is True"),
        ({"allocate": "budgets"}, ValueError, "allocate is 'budgets', must be one of 'patterns'"),
        ({"valu_bits": 3}, TypeError, "did you mean 'value_bits'"),
    ],
)
def test_bad_fields_are_named(fields, error, says):
    with pytest.raises(error) as caught:
        MixKVQConfig.preset("default", **fields)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", [int, float, np.float16, np.float32, np.float64, np.longdouble, np.int8, Fraction])
def test_thresholds_may_be_numbers_of_any_kind(kind):
    with warnings.catch_warnings(action="error"):
        thresholds = MixKVQConfig(thresholds=(kind(2), kind(1))).thresholds
    assert thresholds == (2.0, 1.0) and {type(x) for x in thresholds} == {float}


@pytest.mark.parametrize("allocate", ["budget", "layer"])
def test_a_key_budget_is_whole_columns(allocate):
    config = MixKVQConfig(allocate=allocate, key_budget=2.3)
    assert MixKVQConfig.from_json(config.to_json()) == config
    assert [config.codec(d, "float32").budget_columns for d in (64, 80, 128)] == [4, 5, 9]
    assert config.replace(key_budget=8).codec(80, "float32").budget_columns == 20
    assert config.replace(allocate="patterns").codec(8, "float32").budget_columns == 0
    with pytest.raises(ValueError, match=r"key_budget is 2\.3, must be at least 4 at head_dim 8 "):
        config.codec(8, "float32")
    with pytest.raises(ValueError, match=r"key_budget is 1\.0, must be at least 1\.6 at head_dim 40 "):
        config.replace(key_budget=1.0).codec(40, "float32")


def test_unknown_preset_names_the_close_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'defualt'.*did you mean 'default'"):
        MixKVQConfig.preset("defualt")


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("name", ["default", "compact", "near-lossless", "kivi-2", "kivi-4"])
def test_menus_split_every_head_dim(name, head_dim):
    """One column count, hence one record size, for all patterns of a menu; the mean width stays near that for 64."""
    menu = [dict(pattern) for pattern in PRESETS[name]["key_patterns"]]
    scaled = scale_menu(menu, head_dim)
    columns = column_count(counts_of(menu[0]))
    assert {column_count(counts) for counts in scaled} == {-(-columns * head_dim // 64)}
    for pattern, counts in zip(menu, scaled, strict=True):
        assert sum(counts) == head_dim and min(counts) >= 0
        if head_dim in (64, 128):
            assert counts == tuple(n * head_dim // 64 for n in counts_of(pattern))
        if head_dim >= 80:  # narrower heads have few whole columns to choose from
            mean = sum(n * bits for n, bits in zip(counts, TIER_BITS, strict=True)) / head_dim
            assert abs(mean - sum(n * bits for bits, n in pattern.items()) / 64) < 0.19


def test_a_menu_of_one_tier_gives_it_to_all_channels():
    assert scale_menu([{3: 64}], 40) == ((0, 0, 40, 0, 0, 0),)
    assert scale_menu([{3: 64}, {4: 32, 2: 32}], 40) == ((0, 8, 32, 0, 0, 0), (0, 16, 0, 24, 0, 0))


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 200])
def test_odd_patterns_keep_their_tiers(head_dim):
    """Channel counts that are no whole columns, and exact channels."""
    for pattern in ({16: 8, 4: 56}, {8: 1, 1: 63}, {16: 3, 8: 5, 4: 7, 3: 20, 2: 20, 1: 9}, {16: 64}):
        counts = scale_counts(counts_of(pattern), head_dim)
        assert sum(counts) == head_dim and min(counts) >= 0
        assert counts[5] == round(pattern.get(16, 0) * head_dim / 64)
        assert {tier for tier, n in enumerate(counts) if n} <= {tier for tier, n in enumerate(counts_of(pattern)) if n}
        if head_dim == 64:
            assert counts == counts_of(pattern)


@pytest.mark.parametrize(
    ("name", "at_64", "at_128"),
    [
        ("default", 3.29, 3.22),
        ("compact", 2.48, 2.41),
        ("near-lossless", 4.29, 4.22),
        ("kivi-2", 3.04, 3.04),
        ("kivi-4", 5.04, 5.04),
    ],
)
def test_true_bits_of_presets(name, at_64, at_128):
    """docs/format.md section 6: at most these; everything beside codes and metadata takes 64 (128) bytes."""
    for head_dim, most, overhead in ((64, at_64, 64), (128, at_128, 128)):
        codec = MixKVQConfig.preset(name).codec(head_dim, "bfloat16")
        (nbytes,) = {reference.record_nbytes(codec, counts) for counts in codec.patterns}
        assert 8 * nbytes / (2 * 128 * head_dim) <= most
        metadata = {"e5m3": 2, "fp16": 4}
        groups = head_dim * 128 // codec.key_group, 128 * -(-head_dim // codec.value_group)
        codes = 4 * 128 * column_count(codec.patterns[0]) + 128 * head_dim * codec.value_bits // 8
        known = metadata[codec.key_metadata] * groups[0] + metadata[codec.value_metadata] * groups[1] + codes
        assert nbytes - known <= overhead


def test_true_bits_of_paper_depend_on_its_thresholds():
    """From 2 bits everywhere to all keys exact; one exact channel of 64 costs 0.12 bits in a 16-bit model."""
    config = MixKVQConfig.preset("paper")
    assert (config.allocate, config.thresholds, config.salience) == ("threshold", (1.44, 0.79), "mean_abs")
    codec = config.codec(64, "bfloat16")
    bits = [8 * reference.record_nbytes(codec, (0, 64 - n, 0, 0, 0, n)) / 16384 for n in (0, 1, 16)]
    assert bits[0] == 3.03125 and bits[1] - bits[0] == pytest.approx(0.117, abs=0.02) and 4.5 < bits[2] < 5
