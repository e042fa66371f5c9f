"""Calibration files: what they may hold, whom they fit, what they change."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import copy
import json
import os
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from models import forward, prompts, tiny

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq._core import inspect
from mixkvq.calibration import MAX_BYTES, Calibration
from mixkvq.fingerprint import fingerprint

MODEL = tiny()
OTHER = tiny(num_hidden_layers=3)
PRINT = fingerprint(MODEL.config)
SHORT = {"block_length": 32, "residual_length": 32, "key_group_size": 32}


def made(**changes):
    return Calibration(**{"fingerprint": PRINT, "preset": "default", "fields": {"value_bits": 4}, **changes})


def filled(cache, tokens=100):
    forward(MODEL, cache, prompts([tokens])["input_ids"])
    return cache


def value_bits(cache, layer):
    return {inspect(record)["value_bits"] for record in cache.layers[layer].store.records.records()}


def test_round_trip(tmp_path):
    calibration = made(layers={1: {"value_bits": 2, "key_patterns": (((4, 32), (2, 32)),)}}, summary={"kl": 0.01})
    path = tmp_path / "c.json"
    path.write_text(calibration.to_json())
    loaded = Calibration.load(path)
    base = MixKVQConfig.preset("default")
    assert loaded.config(base) == calibration.config(base)
    assert loaded.layer_configs(base) == calibration.layer_configs(base)
    assert (loaded.fingerprint, loaded.preset, loaded.summary) == (PRINT, "default", {"kl": 0.01})


def test_fields_and_layer_fields_apply(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(made(layers={1: {"value_bits": 2}}).to_json())
    cache = filled(MixKVQCache("default", calibration=path, **SHORT))
    assert (value_bits(cache, 0), value_bits(cache, 1)) == ({4}, {2})
    assert cache.report().preset == "default (calibrated)"


def test_overrides_win():
    cache = filled(MixKVQCache("default", calibration=made(layers={1: {"value_bits": 2}}), value_bits=8, **SHORT))
    assert (value_bits(cache, 0), value_bits(cache, 1)) == ({8}, {8})


@pytest.mark.parametrize("move", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_and_reset_keep_it(move):
    cache = move(MixKVQCache("default", calibration=made(layers={1: {"value_bits": 2}}), **SHORT))
    for _ in range(2):
        assert value_bits(filled(cache), 1) == {2}
        cache.reset()


def test_another_model_is_refused_at_once_with_its_configuration():
    with pytest.raises(ValueError, match=f"{PRINT}.*{fingerprint(OTHER.config)}.*mixkvq calibrate"):
        MixKVQCache("default", calibration=made(), config=OTHER.config)


def test_another_model_is_refused_in_the_first_attention_call_and_leaves_the_cache_empty():
    cache = MixKVQCache("default", calibration=made())
    with pytest.raises(ValueError, match=PRINT):
        forward(OTHER, cache, prompts([10])["input_ids"])
    assert cache.get_seq_length() == 0 and cache.layers == []
    with pytest.raises(ValueError, match=PRINT):  # and again
        forward(OTHER, cache, prompts([10])["input_ids"])
    assert filled(cache).get_seq_length() == 100


def test_another_preset_is_refused_and_a_configuration_of_ones_own_is_not():
    with pytest.raises(ValueError, match=r"for the preset 'default', not for 'compact'.*MixKVQCache\('default'"):
        MixKVQCache("compact", calibration=made())
    with pytest.raises(ValueError, match="not for 'compact'"):
        MixKVQCache(MixKVQConfig.preset("compact"), calibration=made())
    cache = MixKVQCache(MixKVQConfig.preset("compact", value_bits=8), calibration=made())
    assert (cache.mixkvq_config.value_bits, cache.report().preset) == (4, "custom (calibrated)")


def test_a_model_whose_attention_is_not_seen_must_tell_its_configuration():
    """Keys that never come back to the hook: nobody can say which model it is."""
    states = torch.zeros(1, 2, 3, 16)
    for layer in (0, 1):
        cache = MixKVQCache("default", calibration=made())
        cache.update(states, states, 0)
        with pytest.raises(ValueError, match=r"config=model\.config"):
            cache.update(states, states, layer)
        assert cache.layers == [] and cache.report().nbytes == 0
    cache = MixKVQCache("default", calibration=made(), config=MODEL.config)
    for layer in (0, 1):
        cache.update(states, states, layer)
    assert cache.get_seq_length() == 3


def test_attention_without_a_readable_configuration_is_refused():
    for config, error in ((None, ValueError), (object(), TypeError)):
        module = torch.nn.Module()
        if config is not None:
            module.config = config
        cache = MixKVQCache("default", calibration=made())
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
        with pytest.raises(error, match="config"):
            cache.layer_of_call(0, module)
        assert cache.layers == []
    with pytest.raises(TypeError, match="config is"):
        MixKVQCache("default", calibration=made(), config=object())


@pytest.mark.parametrize("options", [{"fields": {"value_bits": 8}}, {"layers": {1: {"value_bits": 2}}}])
def test_schemes_with_a_file(tmp_path, options):
    """What is measured is found again only for the same contents, and a scheme's own fields win."""
    from mixkvq.errors import UserError
    from mixkvq.eval.schemes import parse_scheme

    path = tmp_path / "c.json"
    path.write_text(made(**options).to_json())
    scheme, own = parse_scheme(f"default@{path}"), parse_scheme(f"default@{path}:value_bits=3", {"sink_length": 0})
    path.write_text(made().to_json())
    assert len({scheme.details, own.details, parse_scheme(f"default@{path}").details}) == 3
    cache = scheme.cache(MODEL)  # of the file as it was when the scheme was read
    assert (cache.mixkvq_config, cache._config_of(1)) != (MixKVQConfig.preset("default"), cache._config_of(0))
    assert scheme.config == cache.mixkvq_config and cache.calibration == made(**options)
    mine = own.cache(MODEL)
    assert [mine._config_of(i).value_bits for i in (0, 1)] == [3, 3] and own.config == mine.mixkvq_config
    assert mine.mixkvq_config.sink_length == 0
    for name in (f"compact@{path}", f"default@{tmp_path / 'none.json'}"):
        with pytest.raises(UserError, match="scheme"):
            parse_scheme(name)


def test_a_layer_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match=r"layer 7.*2 layers"):
        MixKVQCache("default", calibration=made(layers={7: {"value_bits": 2}}), config=MODEL.config)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"fields": {"value_bit": 4}}, ValueError, "value_bit"),
        ({"fields": {"value_bits": 5}}, ValueError, "value_bits is 5"),
        ({"fields": [4]}, TypeError, "fields is"),
        ({"layers": [{}]}, TypeError, r"layers is \[\{\}\], must be an object"),
        ({"summary": None}, TypeError, "summary is None, must be an object"),
        ({"preset": "defualt"}, ValueError, "defualt"),
        ({"fingerprint": 7}, TypeError, "fingerprint is 7"),
        ({"layers": {-1: {}}}, ValueError, "-1"),
        ({"layers": {"0": {}}}, ValueError, "'0'"),
        ({"layers": {0: {"sink_length": 2}}}, ValueError, "sink_length"),
        ({"layers": {0: {"value_bits": 5}}}, ValueError, "value_bits is 5"),
    ],
)
def test_wrong_contents_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        made(**changes)


def nested(depth):
    """As many objects and lists in each other, and 0 in the last."""
    value = 0
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


@pytest.mark.parametrize(
    ("summary", "match"),
    [
        ({"kl": float("nan")}, "NaN"),
        ({"kl": float("inf")}, "Infinity"),
        ({"x": nested(63)}, "more than 64 deep"),
        ({"name": "\ud800"}, "half a character"),
    ],
)
def test_what_could_not_be_read_is_not_written(summary, match, tmp_path):
    calibration = made(summary=summary)
    with pytest.raises(ValueError, match=match):
        calibration.to_json()
    with pytest.raises(ValueError, match=f"the cache cannot be saved: its calibration has no JSON: .*{match}"):
        MixKVQCache("default", calibration=calibration).save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_summary_of_the_greatest_depth_is_read_and_written():
    calibration = made(summary={"x": nested(62)})
    assert Calibration.from_json(calibration.to_json()) == calibration
    assert copy.deepcopy(pickle.loads(pickle.dumps(calibration))) == calibration


@pytest.mark.parametrize(
    "fields",
    [
        {"key_patterns": ({4: 32, 2: 32},)},
        {"key_patterns": {4: 32, 2: 32}},
        {"key_patterns": [[[2, 32], [4, 32]]]},
        {"thresholds": [2, 1]},
        {"key_budget": 3},
    ],
)
def test_fields_are_equal_however_they_were_written(fields, tmp_path):
    calibration = made(fields=fields, layers={0: fields})
    assert Calibration.from_json(calibration.to_json()) == calibration
    cache = filled(MixKVQCache("default", calibration=calibration, **SHORT))
    cache.save(tmp_path / "c")
    assert MixKVQCache.load(tmp_path / "c").calibration == calibration


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": {1_000_000: {"value_bits": 2}}}, "layers has the index '1000000'"),
        ({"layers": {index: {} for index in range(4097)}}, "layers has 4097 entries, must have 4096 at most"),
        ({"summary": {"text": "x" * MAX_BYTES}}, "larger than 1048576 bytes"),
    ],
)
def test_what_a_file_cannot_hold_is_not_written(changes, match):
    with pytest.raises(ValueError, match=match):
        made(**changes).to_json()


def data(**changes):
    return json.dumps({**json.loads(made().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"c\.json"),
        ("[1]", "an object"),
        ("{", r"c\.json"),
        ("[" * 100000, r"c\.json.*more than 64 deep"),
        (data(summary={"x": nested(63)}), "more than 64 deep"),
        (data(summary={"x": nested(900)}), "more than 64 deep"),
        (data(version=2), "version is 2"),
        (data(extra=1), "extra"),
        (data(layers=[1]), "layers"),
        (data(layers={"one": {}}), "layers"),
        (data(layers={"01": {}}), "layers has the index '01'"),
        (data(layers={"\u0663": {}}), "layers has the index"),
        (data(version=True), "version is True"),
        (data(fields={"thresholds": [True, False]}), "thresholds is"),
        (data(fields={"thresholds": ["2.0", "1.0"]}), "thresholds is"),
        (data(fields={"thresholds": "21"}), "thresholds is '21'"),
        (data(summary={"kl": float("nan")}), "NaN"),
        (data().replace('"layers": {', '"layers": {"1": {}, "1": {}', 1), "'1' is given twice"),
        (
            data().replace("{", "{" + "".join(f'"{n}": 0, ' for n in range(50_000)) + '"49999": 0, ', 1),
            "'49999' is given",
        ),
        (data(fields={"thresholds": [10**400, 1]}), "must be finite"),
        (data(summary=3), "summary is 3"),
        (data(fields={"thresholds": [1]}), "thresholds"),
        (" " * (MAX_BYTES + 1), "larger"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, text, match):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        MixKVQCache("default", calibration=path)


def test_bytes_that_are_no_text_and_things_that_are_no_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"c\.json"):
        Calibration.load(path)
    with pytest.raises(OSError, match=r"none\.json"):
        Calibration.load(tmp_path / "none.json")
    with pytest.raises(TypeError, match="calibration is 3"):
        MixKVQCache("default", calibration=3)
    for strange, error in ((3, TypeError), (b"c", TypeError), ("", ValueError), ("a\0b", ValueError)):
        with pytest.raises(error, match=r"path is .*, must"):
            Calibration.load(strange)
    os.mkfifo(tmp_path / "pipe")
    for strange in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match=f"not a regular file: '{strange}'"):
            Calibration.load(strange)
