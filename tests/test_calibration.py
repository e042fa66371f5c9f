"""Calibration files: what they may hold, whom they fit, what they change."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import copy
import json
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


def test_a_layer_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match=r"layer 7.*2 layers"):
        MixKVQCache("default", calibration=made(layers={7: {"value_bits": 2}}), config=MODEL.config)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"fields": {"value_bit": 4}}, ValueError, "value_bit"),
        ({"fields": {"value_bits": 5}}, ValueError, "value_bits is 5"),
        ({"fields": [4]}, TypeError, "fields is"),
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


def data(**changes):
    return json.dumps({**json.loads(made().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"c\.json"),
        ("[1]", "an object"),
        ("{", r"c\.json"),
        ("[" * 100000, r"c\.json"),
        (data(version=2), "version is 2"),
        (data(extra=1), "extra"),
        (data(layers=[1]), "layers"),
        (data(layers={"one": {}}), "layers"),
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
