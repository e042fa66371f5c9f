"""`mixkvq.estimate` against the report of caches that models have filled."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from families import DECODED, FAMILIES
from models import forward, prompts, tiny
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig

import mixkvq
from mixkvq import MixKVQCache, MixKVQConfig, compat, estimate, largest_batch, largest_tokens, list_presets
from mixkvq.calibration import Calibration
from mixkvq.eval.memory import cache_nbytes
from mixkvq.fingerprint import fingerprint
from mixkvq.report import Report
from mixkvq.shapes import cached_layers

pytestmark = pytest.mark.skipif(
    not compat.RUNS_WITHOUT_NUMBERS, reason="before transformers 5.0 no model runs without numbers"
)

BORDERS = (5, 131, 132, 133, 260, 387)
"""A block is due from 132, 260 and 388 tokens on; where the first tokens are not kept, 4 tokens earlier."""
FAMILY_NAMES = ("llama", "llama_dim80", "gemma3", "gemma3n", "qwen3_next", "jamba", "falcon_h1", "deepseek_v3", "bart")


def filled(model, cache, tokens: int, batch: int = 1, steps: int = 2):
    """The cache after a prompt read at once and some tokens read alone."""
    ids = prompts([tokens] * batch)["input_ids"]
    options, given = {}, cache
    if model.config.is_encoder_decoder:
        given = EncoderDecoderCache(cache, DynamicCache())
    for part in torch.split(ids, [tokens - steps, *[1] * steps], dim=1):
        if model.config.is_encoder_decoder:
            options = {"decoder_input_ids": part}
            part = ids[:, :3]
        with torch.inference_mode():
            forward(model, given, part, **options)
    return cache


def assert_equal(report: Report, found: mixkvq.Estimate) -> None:
    """To the byte, layer by layer."""
    assert [layer.nbytes for layer in found.layers] == [layer.nbytes for layer in report.layers]
    assert [layer.path for layer in found.layers] == [layer.path for layer in report.layers]
    assert [layer.elements for layer in found.layers] == [layer.elements for layer in report.layers]
    assert found.nbytes == found.least_nbytes == found.most_nbytes == report.nbytes
    assert (found.true_bits, found.effective_bits) == pytest.approx((report.true_bits, report.effective_bits))
    assert found.preset == report.preset


@pytest.mark.parametrize("preset", [name for name in list_presets() if name != "paper"])
@pytest.mark.parametrize("tokens", BORDERS)
def test_every_preset_to_the_byte(preset, tokens):
    model = tiny()
    report = filled(model, MixKVQCache(preset), tokens, batch=2).report()
    assert_equal(report, estimate(model.config, tokens=tokens, batch=2, preset=preset))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("tokens", [3, 200])
def test_every_kind_of_layer_to_the_byte(family, tokens):
    if (absent := FAMILIES[family].absent("sdpa")) != "":
        pytest.skip(absent)
    model = tiny(family)
    for batch in (1, 3):
        report = filled(model, MixKVQCache(config=model.config), tokens, batch).report()
        found = estimate(model.config, tokens=tokens, batch=batch)
        assert_equal(report, found)
        stock = filled(model, DynamicCache(config=model.config.get_text_config(decoder=True)), tokens, batch)
        assert found.dynamic_nbytes == pytest.approx(cache_nbytes(stock), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = tiny(dtype=dtype)
    report = filled(model, MixKVQCache(), 300).report()
    assert_equal(report, estimate(model.config, tokens=300, dtype=dtype))
    assert_equal(report, estimate(model.config, tokens=300, dtype=str(dtype)))


def test_fields_that_replace_those_of_a_preset():
    model, fields = tiny(), {"sink_length": 9, "residual_length": 200, "block_length": 64, "value_bits": 4}
    assert_equal(filled(model, MixKVQCache(**fields), 350).report(), estimate(model.config, tokens=350, **fields))


@pytest.mark.parametrize("allocate", ["budget", "layer"])
def test_a_budget_is_spent(allocate):
    model, fields = tiny(), {"allocate": allocate, "key_budget": 4.0}
    report = filled(model, MixKVQCache(**fields), 500).report()
    found = estimate(model.config, tokens=500, **fields)
    assert found.nbytes == pytest.approx(report.nbytes, rel=0.02)
    assert found.least_nbytes <= report.nbytes <= found.most_nbytes


def test_layers_of_a_calibration():
    model = tiny()
    wider = Calibration(fingerprint(model.config), "default", {"sink_length": 8}, {1: {"value_bits": 8}})
    found = estimate(model.config, tokens=300, calibration=wider)
    assert_equal(filled(model, MixKVQCache(calibration=wider), 300).report(), found)
    assert found.layers[1].nbytes > found.layers[0].nbytes


@pytest.mark.filterwarnings("ignore:MixKVQCache")
def test_a_layer_that_is_decoded_in_every_step_packs_one_token_later():
    family = next(name for name, about in FAMILIES.items() if set(about.paths("eager")) == {DECODED})
    model = tiny(family, "eager")
    report = filled(model, MixKVQCache(config=model.config), 150).report()
    assert {layer.path for layer in report.layers} == {DECODED}
    assert estimate(model.config, tokens=150).nbytes == pytest.approx(report.nbytes, rel=0.02)


def test_padding_of_other_rows_is_not_stored():
    model, inputs = tiny(), prompts([300, 40])
    cache = MixKVQCache()
    with torch.inference_mode():
        forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    assert cache.report().nbytes < estimate(model.config, tokens=300, batch=2).nbytes


# ---- thresholds ----------------------------------------------------------------------------------------------------
def test_thresholds_give_a_range():
    model = tiny()
    report = filled(model, MixKVQCache("paper"), 300).report()
    found = estimate(model.config, tokens=300, preset="paper")
    assert found.nbytes is found.true_bits is found.effective_bits is None
    assert found.least_nbytes <= report.nbytes <= found.most_nbytes
    assert found.true_bits_range[0] <= report.true_bits <= found.true_bits_range[1]
    assert estimate(model.config, tokens=100, preset="paper").nbytes is not None  # nothing is packed yet


@pytest.mark.parametrize(("thresholds", "bits"), [((1e9, 1e9), 2), ((0.0, 0.0), 16)])
def test_the_ends_of_the_range_are_reached(thresholds, bits):
    model = tiny(dtype=torch.bfloat16)
    report = filled(model, MixKVQCache("paper", thresholds=thresholds), 300).report()
    found = estimate(model.config, tokens=300, preset="paper", dtype="bfloat16")
    assert report.nbytes == (found.least_nbytes if bits == 2 else found.most_nbytes)


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_h1", "deepseek_v3"])
@pytest.mark.parametrize("steps", [1, 2, 140])
def test_the_peak(family, steps):
    if absent := FAMILIES[family].absent("sdpa"):
        pytest.skip(absent)
    model = tiny(family)
    for preset in ("default", "lossless"):
        for tokens in (141, 261, 388, 800):
            report = filled(model, MixKVQCache(preset, config=model.config), tokens, 2, steps).report()
            found = estimate(model.config, tokens=tokens, batch=2, preset=preset, prompt=tokens - steps)
            assert found.nbytes == report.nbytes
            assert 0 <= found.peak_nbytes / report.peak_nbytes - 1 <= (0.04 if steps == 140 else 0)


def test_the_peak_of_a_long_prompt_is_that_of_its_windows():
    if absent := FAMILIES["gemma3"].absent("sdpa"):
        pytest.skip(absent)
    found = estimate(tiny("gemma3").config, tokens=900)
    assert found.peak_nbytes > 1.4 * found.nbytes  # the sliding layer holds all of the prompt until the next token
    short = estimate(tiny("gemma3").config, tokens=900, prompt=10)
    assert short.nbytes == found.nbytes and short.peak_nbytes < 0.8 * found.peak_nbytes


# ---- how many fit --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["default", "lossless", "paper"])
def test_the_largest_batch_fits_and_one_row_more_does_not(preset):
    config, memory = tiny().config, 3_000_000
    batch = largest_batch(config, memory, tokens=700, preset=preset)
    sizes = [estimate(config, tokens=700, batch=n, preset=preset).most_peak_nbytes for n in (batch, batch + 1)]
    assert batch > 1 and sizes[0] <= memory < sizes[1]
    assert largest_batch(config, 1000, tokens=700, preset=preset) == 0


def test_the_most_tokens_fit_and_one_more_does_not():
    config, memory = tiny().config, 1_000_000
    tokens = largest_tokens(config, memory, batch=3)
    sizes = [estimate(config, tokens=n, batch=3).peak_nbytes for n in (tokens, tokens + 1)]
    assert tokens > 300 and sizes[0] <= memory < sizes[1]


def test_a_cache_that_does_not_grow_has_no_largest_number_of_tokens():
    if (absent := FAMILIES["mamba"].absent("eager")) != "":
        pytest.skip(absent)
    with pytest.raises(ValueError, match="does not grow"):
        largest_tokens(tiny("mamba", "eager").config, 10_000_000)


# ---- arguments -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens is 0, must be at least 1"),
        ({"tokens": 2.0}, TypeError, "tokens is 2.0, must be an int"),
        ({"tokens": 5, "batch": -1}, ValueError, "batch is -1, must be at least 1"),
        ({"tokens": 5, "prompt": 6}, ValueError, r"prompt is 6, must be at most tokens \(5\)"),
        ({"tokens": 5, "preset": "defualt"}, ValueError, "unknown preset 'defualt'"),
        ({"tokens": 5, "sinks": 1}, TypeError, "unknown field 'sinks'"),
        ({"tokens": 5, "dtype": "int8"}, ValueError, "dtype is 'int8', must be one of float32, float16, bfloat16"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        estimate(tiny().config, **options)


def test_a_configuration_is_needed():
    with pytest.raises(TypeError, match="config is 'llama', must be a model's configuration"):
        estimate("llama", tokens=5)
    with pytest.raises(TypeError, match="memory is 1\\.5, must be a number of bytes"):
        largest_batch(tiny().config, 1.5, tokens=5)
    with pytest.raises(ValueError, match="memory is -1, must be at least 0"):
        largest_batch(tiny().config, -1, tokens=5)


def test_the_configuration_is_left_as_it_was():
    config = tiny().config
    before = (config.to_dict(), config._attn_implementation)
    estimate(config, tokens=300)
    assert (config.to_dict(), config._attn_implementation) == before


def test_the_dtype_of_the_configuration_counts():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, dtype="bfloat16"
    )
    assert estimate(config, tokens=50).dtype == "bfloat16"
    assert estimate(config, tokens=50).dynamic_nbytes == 2 * 50 * 64 * 2


def test_a_large_model_is_not_built():
    config = LlamaConfig(  # the shape of a model of 405 billion parameters
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    found = estimate(config, tokens=100_000, batch=4)
    assert found.dynamic_nbytes == 126 * 2 * 2 * 8 * 128 * 100_000 * 4
    assert 0.19 < found.nbytes / found.dynamic_nbytes < 0.22


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_shapes(family):
    about = FAMILIES[family]
    if about.absent("sdpa") and (absent := about.absent("eager")):
        pytest.skip(absent)
    if family == "jetmoe":  # moves numbers to the CPU
        pytest.skip("its code does not run without numbers")
    attention = next(a for a in about.attention if not about.absent(a))
    config = copy.deepcopy(tiny(family, attention).config)
    config.architectures = [about.model]
    layout = DynamicCache(config=config.get_text_config(decoder=True)).layers
    assert [layer.kind for layer in cached_layers(config, torch.float32, 100)] == [type(layer) for layer in layout]


def test_the_capacity_of_a_configuration():
    config = MixKVQConfig(sink_length=4, residual_length=128, block_length=64)
    assert [config.due_blocks(n) for n in (0, 131, 132, 195, 196, 1156)] == [0, 0, 1, 1, 2, 17]
    assert config.due_blocks(140, margin=9) == 0
