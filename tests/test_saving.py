"""Saved caches: what comes back is the cache that was saved, in this process and in another."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from core_cases import examples
from hypothesis import given
from hypothesis import strategies as st
from models import forward, lossless, paths, prompts, tiny
from test_cache_operations import FIELDS, MODES, PRESETS, filled
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mixkvq import MixKVQCache, compat
from mixkvq.calibration import Calibration
from mixkvq.fingerprint import fingerprint
from mixkvq.layer import MixKVQLayer
from mixkvq.proof import MIN_KEYS

CONFIGS = [*PRESETS, "lossless", "compact", "exact values"]
SHORT = {"block_length": 32, "residual_length": 32, "key_group_size": 32}
EXACT_VALUES = {"value_bits": 16, "value_basis": "identity"}


def made(name: str, lengths=(150, 110, 77), **more):
    if name == "exact values":
        return filled("default", list(lengths), **EXACT_VALUES, **more)
    return filled(name, list(lengths), **more)


def loaded(cache: MixKVQCache, folder: Path, **options) -> MixKVQCache:
    cache.save(folder / "cache.safetensors")
    return MixKVQCache.load(folder / "cache.safetensors", **options)


def step(cache, mask, seed: int = 0, model=None):
    """Logits of one more token, and the mask with it."""
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
    ids = (torch.arange(len(mask)).view(-1, 1) * 5 + seed) % 90 + 2
    return forward(model or tiny("llama"), cache, ids, mask), mask


def records(cache: MixKVQCache) -> list[bytes]:
    """All records of all layers in the order of rows, heads and blocks."""
    found = []
    for layer in cache.layers:
        if isinstance(layer, MixKVQLayer) and layer.store is not None:
            place = layer.store.place
            found += [layer.store.records._bytes(p) for p in place[place >= 0].tolist()]
    return found


def told(cache: MixKVQCache) -> list[dict]:
    """What the report says of every layer, unused room and reasons left out."""
    layers = [dataclasses.asdict(layer) for layer in cache.report().layers]
    return [{name: value for name, value in layer.items() if name not in ("nbytes", "why")} for layer in layers]


# ---- the same cache ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_goes_on_bit_for_bit(name, dtype, tmp_path):
    """Several blocks are packed behind it, whose bits depend on the statistics of all queries."""
    cache, mask = made(name)
    if dtype != torch.float32:
        model = tiny("llama", dtype=dtype)
        cache = MixKVQCache(cache.mixkvq_config, precision="exact")
        forward(model, cache, prompts([150, 110, 77])["input_ids"], mask[:, :150])
        mask = mask[:, :150]
    other = loaded(cache, tmp_path)
    assert told(other) == told(cache) and other.report().nbytes <= cache.report().nbytes
    assert records(other) == records(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(70):
            (want, longer), (got, _) = (step(c, mask, seed, tiny("llama", dtype=dtype)) for c in (cache, other))
            assert torch.equal(got, want), seed
            mask = longer
    assert records(other) == records(cache) and len(records(other)) > 2 * 2 * 6
    assert [layer.dequantizations for layer in other.layers] == [1, 1], "to prove how attention reads it"
    assert paths(other) == ["packed", "packed"] and "proved" in other.layers[0].reason.what


@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_as_small_as_the_records_and_the_same_every_time(name, tmp_path):
    cache, _ = made(name)
    cache.reorder_cache(torch.tensor([2, 0, 0]))  # rows that share records; dead ones
    other = loaded(cache, tmp_path)
    first, again = tmp_path / "cache.safetensors", tmp_path / "again"
    for each in (cache, other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        each.save(again)
        assert again.read_bytes() == first.read_bytes()
    stores = [layer.store for layer in cache.layers]
    used = [int(s.exact.max()) * s.k[:, :, 0].nbytes * 2 for s in stores]
    aside = [
        s.place.nbytes + sum(t.nbytes for t in (s.exact, s.start, s.blocks, s.mu, s.has_mu) if t is not None)
        for s in stores
    ]
    sums = [t.nbytes for s in stores for t in s.queries.tensors()]
    total = sum(s.totals().record_bytes for s in stores) + sum(used + aside + sums)
    data = int.from_bytes(first.read_bytes()[:8], "little")
    assert first.stat().st_size == 8 + data + total and data < 6000


def test_the_safetensors_library_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    cache, _ = filled()
    cache.save(tmp_path / "c")
    tensors = safetensors.load_file(tmp_path / "c")
    assert torch.equal(tensors["layers.1.exact"], cache.layers[1].store.exact)
    with safetensors.safe_open(tmp_path / "c", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["preset"]) == ("mixkvq-cache", "1", "custom")


@pytest.mark.parametrize("tokens", [0, 1, 40, 68])
def test_a_cache_that_has_packed_nothing(tokens, tmp_path):
    cache, other = MixKVQCache(**FIELDS), None
    inputs = prompts([tokens, max(tokens - 9, 1)]) if tokens else {}
    mask = inputs.get("attention_mask", torch.ones(2, 0, dtype=torch.long))
    if tokens:
        forward(tiny("llama"), cache, ids=inputs["input_ids"], mask=mask)
    other = loaded(cache, tmp_path)
    assert told(other) == told(cache) and other.get_seq_length() == tokens
    for seed in range(80):
        (want, longer), (got, _) = (step(c, mask, seed) for c in (cache, other))
        assert torch.equal(got, want)
        mask = longer
    assert paths(other) == ["packed", "packed"] and records(other) == records(cache)


@pytest.mark.parametrize(
    "operation", ["crop", "crop into a block", "crop all", "reorder", "select", "repeat", "reset", "record"]
)
def test_operations_on_a_loaded_cache(operation, tmp_path):
    cache, mask = filled()
    other = loaded(cache, tmp_path)
    for each in (cache, other):
        if operation == "crop":
            each.crop(-40)
        elif operation == "crop into a block":  # more of it comes back than the buffers of a file hold
            assert other.layers[0].store.k.shape[2] < 4 + (155 - 25 - 4) % 32
            each.crop(-25)
        elif operation == "crop all":
            each.crop(-155)
        elif operation == "reorder":
            each.reorder_cache(torch.tensor([2, 0, 1]))
        elif operation == "select":
            each.batch_select_indices(torch.tensor([1, 2]))
        elif operation == "repeat":
            each.batch_repeat_interleave(2)
        elif operation == "reset":
            each.reset()
        else:
            each.activate_past_recording()
    rows = {"reorder": [2, 0, 1], "select": [1, 2], "repeat": [0, 0, 1, 1, 2, 2]}.get(operation, [0, 1, 2])
    keep = {"crop": 115, "crop into a block": 130, "crop all": 0, "reset": 0}.get(operation, 155)
    mask = mask[rows, :keep]
    for seed in range(40):
        (want, longer), (got, _) = (step(c, mask, seed) for c in (cache, other))
        assert torch.equal(got, want)
        mask = longer
    assert records(other) == records(cache)


def test_a_loaded_cache_in_inference_mode_and_outside(tmp_path):
    cache, mask = filled()
    with torch.inference_mode():
        other = loaded(cache, tmp_path)
    for seed in range(40):
        (want, longer), (got, _) = (step(c, mask, seed) for c in (cache, other))
        assert torch.equal(got, want)
        mask = longer


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_default_device(family, tmp_path):
    """Such as people set to make models without weights."""
    cache, mask, model = MixKVQCache(**SHORT), torch.ones(1, 90, dtype=torch.long), tiny(family)
    forward(model, cache, prompts([90])["input_ids"], mask)
    with torch.device("meta"):
        other = loaded(cache, tmp_path)
        (fork,) = other.fork(1)
        fork.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "cache.safetensors").read_bytes()
    assert torch.equal(step(fork, mask, model=model)[0], step(cache, mask, model=model)[0])


# ---- the model -----------------------------------------------------------------------------------------------------
def other_rope():
    """The model with another base of its rotations."""
    model = copy.deepcopy(tiny())
    config = model.config
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": 500.0}
    else:
        config.rope_theta = 500.0
    for layer in model.model.layers:
        layer.self_attn.config = config
    return model


@pytest.mark.parametrize("how", ["config", "first call"])
def test_another_rope_is_refused(how, tmp_path):
    cache, mask = filled()
    match = rf"cache.safetensors is for {fingerprint(tiny().config)}, the model is llama-.*500.0"
    cache.save(tmp_path / "cache.safetensors")
    if how == "config":
        with pytest.raises(ValueError, match=match):
            MixKVQCache.load(tmp_path / "cache.safetensors", config=other_rope().config)
        return
    other = MixKVQCache.load(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=match):
        step(other, mask, model=other_rope())
    assert other.get_seq_length() == 0 and other.model_record is None
    forward(other_rope(), other, prompts([40])["input_ids"])  # it is a new cache now
    assert other.model_record.fingerprint == fingerprint(other_rope().config)


@pytest.mark.parametrize("source", ["nobody", "config", "first call"])
def test_whom_a_cache_is_for(source, tmp_path):
    cache = MixKVQCache(config=tiny().config if source == "config" else None, **SHORT)
    if source == "first call":
        forward(tiny(), cache, prompts([80])["input_ids"])
    known = None if source == "nobody" else fingerprint(tiny().config)
    assert (cache.model_record and cache.model_record.fingerprint) == known
    other = loaded(cache, tmp_path)
    assert (other.model_record and other.model_record.fingerprint) == known
    same = loaded(cache, tmp_path, config=tiny().config)
    assert same.model_record.fingerprint == fingerprint(tiny().config)
    same.reset()
    assert same.model_record is not None and len(same.layers) == 2


def test_a_model_that_cannot_be_seen_must_be_told(tmp_path):
    model, cache = tiny("bloom", "eager"), lossless(config=tiny("bloom", "eager").config)
    forward(model, cache, prompts([90])["input_ids"])
    other = loaded(cache, tmp_path)
    with pytest.raises(ValueError, match=r"config=model\.config"):
        forward(model, other, torch.tensor([[5]]))
    other = loaded(cache, tmp_path, config=model.config)
    with pytest.warns(UserWarning, match="does not pass through"):
        got = forward(model, other, torch.tensor([[5]]))
        want = forward(model, cache, torch.tensor([[5]]))
    assert torch.equal(got, want)


def test_what_is_no_configuration(tmp_path):
    with pytest.raises(TypeError, match="config is 7"):
        loaded(filled()[0], tmp_path, config=7)


# ---- what else a cache has -----------------------------------------------------------------------------------------
def test_calibration_and_layers_of_their_own(tmp_path):
    calibration = Calibration(fingerprint(tiny().config), "default", {"value_bits": 4}, {1: {"value_bits": 2}})
    cache = MixKVQCache("default", calibration=calibration, precision="fast", **SHORT)
    forward(tiny(), cache, prompts([100])["input_ids"])
    other = loaded(cache, tmp_path)
    assert other.calibration == calibration and other.precision == "fast"
    assert other.report().preset == cache.report().preset == "default (calibrated)"
    assert other._layer_configs == cache._layer_configs and other.mixkvq_config == cache.mixkvq_config
    other.reset()
    forward(tiny(), other, prompts([100])["input_ids"])
    assert records(other) == records(cache)


@pytest.mark.skipif(
    not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"), reason="a full sliding window cannot be cropped"
)
def test_an_expected_rollback_stays_expected(tmp_path):
    cache, mask = MixKVQCache(**FIELDS), torch.ones(1, 90, dtype=torch.long)
    cache.activate_past_recording()
    forward(tiny("gemma3"), cache, prompts([90])["input_ids"], mask)
    other = loaded(cache, tmp_path)
    for each in (cache, other):
        step(each, mask, model=tiny("gemma3"))
        each.crop(-1)
    (want, _), (got, _) = (step(c, mask, 3, tiny("gemma3")) for c in (cache, other))
    assert torch.equal(got, want) and other.is_recording_past(0)


@pytest.mark.filterwarnings("ignore:MixKVQCache")
def test_a_cache_that_was_filled_by_update(tmp_path):
    generator = torch.Generator().manual_seed(0)
    cache, other = MixKVQCache(**FIELDS), None
    for n in (100, 30):
        k, v = torch.randn(2, 1, 2, n, 16, generator=generator)
        for layer in range(2):
            cache.update(k, v, layer)
    other = loaded(cache, tmp_path)
    assert told(other) == told(cache) and other.layers[1].waiting
    mask = torch.ones(1, 130, dtype=torch.long)
    for seed in range(3):
        (want, longer), (got, _) = (step(c, mask, seed) for c in (cache, other))
        assert torch.equal(got, want)
        mask = longer
    assert paths(other) == paths(cache) == ["packed", "packed"]


def test_other_attention_than_it_was_filled_with(tmp_path):
    cache, mask = filled()
    other = loaded(cache, tmp_path)
    (want, _), (got, _) = step(cache, mask), step(other, mask, model=tiny("llama", "eager"))
    assert torch.allclose(got, want, atol=1e-5) and paths(other) == ["packed", "packed"]


def test_attention_that_is_not_what_the_kernel_computes(tmp_path):
    from one_layer import Layer, attention

    def inverted(module, query, *rest, **arguments):
        return attention(module, -query, *rest, **arguments)

    layer = Layer(lossless())
    for _ in range(70):
        layer.step()
    assert paths(layer.cache) == ["packed"]
    layer.cache = loaded(layer.cache, tmp_path)
    layer.function = inverted
    with pytest.warns(UserWarning, match="decoded in every step"):
        got, want = layer.step()
    assert torch.allclose(got, want, atol=1e-5) and paths(layer.cache) == ["dequantized"]


def test_attention_that_is_not_seen_is_warned_of(tmp_path, monkeypatch):
    cache, mask = filled()
    other = loaded(cache, tmp_path, config=tiny().config)
    from mixkvq import install, uninstall

    uninstall()
    try:
        with pytest.warns(UserWarning, match="decoded in every step: the attention hook was taken out"):
            for seed in range(2):
                _, mask = step(other, mask, seed)
        assert paths(other) == ["dequantized", "dequantized"]
    finally:
        install()
    step(other, mask, 2)
    assert paths(other) == ["packed", "packed"], "attention that is seen again proves"


def test_an_encoder_decoder_cache_saves_its_half(tmp_path):
    model = tiny("bart")
    inputs = {"input_ids": prompts([24])["input_ids"], "decoder_input_ids": prompts([90], 3)["input_ids"]}
    both = EncoderDecoderCache(MixKVQCache(**SHORT), DynamicCache())
    with torch.no_grad():
        model(**inputs, **compat.cache_argument(both))
        half = loaded(both.self_attention_cache, tmp_path)
        new = {**inputs, "decoder_input_ids": torch.tensor([[5]])}
        want = model(**new, **compat.cache_argument(both)).logits
        got = model(**new, **compat.cache_argument(EncoderDecoderCache(half, DynamicCache()))).logits
    assert torch.allclose(got, want, atol=1e-5)


# ---- what cannot be saved ------------------------------------------------------------------------------------------
class Strange(DynamicLayer):
    pass


@pytest.mark.filterwarnings("ignore:MixKVQCache")
@pytest.mark.parametrize("what", ["gradients", "class", "attribute", "half", "dtype", "rows"])
def test_what_cannot_be_saved_is_named_before_anything_is_written(what, tmp_path):
    cache = MixKVQCache(**SHORT)
    forward(tiny(), cache, prompts([40])["input_ids"], gradients=what == "gradients")
    match = {"gradients": "layer 0 .*no_grad", "class": "layer 1 .Strange", "half": "layer 0 .*same tokens"}
    match |= {"attribute": "layer 1 .DynamicLayer.*its note is a set", "dtype": "layer 0 .*complex64"}
    match |= {"rows": "no rows"}
    if what in ("class", "attribute"):
        cache.layers[1] = Strange() if what == "class" else DynamicLayer()
        cache.layers[1].note = set()
    elif what == "rows":
        cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    elif what == "half":
        cache.layers[0].keys = None
    elif what == "dtype":
        cache.reset()
        cache.update(*torch.zeros(2, 1, 2, 3, 16, dtype=torch.complex64), 0)
    (tmp_path / "c").write_bytes(b"old")
    with pytest.raises(ValueError, match=match[what]):
        cache.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ---- anything ------------------------------------------------------------------------------------------------------
@examples(25)
@given(
    preset=st.sampled_from(["default", "compact", "paper", "kivi-4", "lossless", "layer"]),
    block=st.sampled_from([32, 64]),
    more=st.integers(0, 40),
    sink=st.sampled_from([0, 1, 4]),
    lengths=st.lists(st.integers(1, 180), min_size=1, max_size=3),
    extra=st.integers(0, 3),
    crop=st.integers(0, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_cache_comes_back(tmp_path, preset, block, more, sink, lengths, extra, crop, dtype):
    name, fields = MODES.get(preset, (preset, {}))
    model, inputs = tiny(dtype=dtype), prompts(lengths)
    cache, mask = (
        MixKVQCache(
            name, **SHORT | fields | {"block_length": block, "residual_length": block + more, "sink_length": sink}
        ),
        inputs["attention_mask"],
    )
    forward(model, cache, inputs["input_ids"], mask)
    for seed in range(extra):
        _, mask = step(cache, mask, seed, model)
    crop = min(crop, mask.shape[1] - 1)
    if crop and int(mask[:, : mask.shape[1] - crop].sum(1).min()) >= MIN_KEYS:  # fewer keys prove nothing
        cache.crop(-crop)
        mask = mask[:, : mask.shape[1] - crop]
    other = loaded(cache, tmp_path)
    assert told(other) == told(cache)
    for seed in range(block + 2):
        (want, longer), (got, _) = (step(c, mask, seed, model) for c in (cache, other))
        assert torch.equal(got, want)
        mask = longer
    assert records(other) == records(cache)
    loaded(other, tmp_path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "cache.safetensors").read_bytes()
