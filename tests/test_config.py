"""`MixKVQConfig`: presets, JSON, refusals, and menus scaled to other head_dims."""

from __future__ import annotations

import dataclasses

import pytest

from mixkvq import MixKVQConfig, list_presets
from mixkvq.policy.patterns import column_count, counts_of, scale_counts
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
        ({"valu_bits": 3}, TypeError, "did you mean 'value_bits'"),
    ],
)
def test_bad_fields_are_named(fields, error, says):
    with pytest.raises(error) as caught:
        MixKVQConfig.preset("default", **fields)
    assert says in str(caught.value)


def test_unknown_preset_names_the_close_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'defualt'.*did you mean 'default'"):
        MixKVQConfig.preset("defualt")


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("name", ["default", "compact"])
def test_menus_split_every_head_dim(name, head_dim):
    for pattern in PRESETS[name]["key_patterns"]:
        counts = counts_of(pattern)
        scaled = scale_counts(counts, head_dim)
        assert sum(scaled) == head_dim and min(scaled) >= 0
        if head_dim % 64 == 0:
            assert scaled == tuple(n * head_dim // 64 for n in counts)
        elif head_dim > 8 and len(pattern) > 1:  # one tier takes all channels, whatever columns that needs
            assert column_count(scaled) == -(-column_count(counts) * head_dim // 64)
