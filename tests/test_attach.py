"""`mixkvq.attach`: generate without a cache argument, in the hands of programs that have none."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers
from eval_fixtures import byte_model
from families import FAMILIES
from models import prompts, tiny
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, LlamaConfig, LlamaForCausalLM
from versions import needs_linear, with_stock_cache

import mixkvq
from mixkvq import MixKVQCache, compat
from mixkvq.calibration import Calibration
from mixkvq.compat import cache_argument
from mixkvq.fingerprint import fingerprint

SHORT = {"residual_length": 32, "block_length": 32, "key_group_size": 32}
"""Blocks that short prompts fill."""
INPUTS = prompts([90, 53])


@pytest.fixture
def model():
    """One that nobody else attaches to."""
    return copy.deepcopy(tiny())


def written(model, inputs=INPUTS, **options):
    """Tokens that a model writes without being told of a cache."""
    return model.generate(**inputs, max_new_tokens=40, **{"do_sample": False, **options})


def by_hand(model, preset="default", inputs=INPUTS, fields=SHORT, **options):
    cache = MixKVQCache(preset, config=model.config, **fields)
    given = EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache
    return written(model, inputs, **cache_argument(given), **options), cache


# ---- what it does --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["default", "compact", "paper", "lossless"])
def test_the_same_tokens_as_with_a_cache_by_hand(model, preset):
    fields = {name: value for name, value in SHORT.items() if preset != "lossless" or name != "key_group_size"}
    exact = written(model)
    want, cache = by_hand(model, preset, fields=fields)
    with mixkvq.attach(model, preset, **fields) as handle:
        got = written(model)
        assert torch.equal(got, want)
        assert torch.equal(got, exact) == (preset == "lossless")
        assert handle.made == 1 and handle.cache.report().nbytes == cache.report().nbytes
        assert {layer.path for layer in handle.cache.report().layers} == {"packed"}
    assert torch.equal(written(model), exact) and handle.made == 1


def test_every_generate_gets_a_fresh_cache(model):
    handle = mixkvq.attach(model, **SHORT)
    first = written(model)
    kept = weakref.ref(handle.cache)
    assert torch.equal(written(model), first) and handle.made == 2
    gc.collect()
    assert kept() is None  # let go before the second was made
    handle.detach()
    assert handle.cache is not None  # still there to be reported on


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 25},
    ],
)
def test_ways_to_generate(model, options):
    inputs = prompts([90]) if "prompt_lookup_num_tokens" in options else INPUTS
    with_stock_cache(lambda: written(model, inputs, **options))
    torch.manual_seed(0)
    want, _ = by_hand(model, inputs=inputs, **options)
    with mixkvq.attach(model, **SHORT) as handle:
        torch.manual_seed(0)
        assert torch.equal(written(model, inputs, **options), want)
        assert handle.made == 1


def test_an_assistant_may_be_attached_too(model):
    assistant, inputs = copy.deepcopy(tiny(seed=1)), prompts([90])
    assistant.generation_config.num_assistant_tokens = 4
    want, _ = by_hand(model, "lossless", inputs, {"residual_length": 32, "block_length": 32}, assistant_model=assistant)
    fields = {"residual_length": 32, "block_length": 32}
    with mixkvq.attach(model, "lossless", **fields) as ours, mixkvq.attach(assistant, "lossless", **fields) as theirs:
        assert torch.equal(written(model, inputs, assistant_model=assistant), want)
    assert ours.made == 1
    if compat.VERSION >= (5, 18):  # before, an assistant asks for a cache_implementation
        assert theirs.made >= 1
    assert torch.equal(want, written(model, inputs))


@pytest.mark.parametrize("family", ["bart", "t5", "gemma3", pytest.param("qwen3_next", marks=needs_linear)])
def test_other_families(family):
    if absent := FAMILIES[family].absent("eager"):
        pytest.skip(absent)
    model = copy.deepcopy(tiny(family, "eager"))
    inputs = {**prompts([20, 14])} if model.config.is_encoder_decoder else INPUTS
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompts([90, 90], seed=3)["input_ids"]
    want, cache = by_hand(model, inputs=inputs)
    with mixkvq.attach(model, **SHORT) as handle:
        assert torch.equal(written(model, inputs), want)
        assert type(handle.cache) is MixKVQCache and handle.cache.report().nbytes == cache.report().nbytes


def test_a_calibration_is_read_when_attached(model, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(Calibration(fingerprint(model.config), "default", {"value_bits": 8}).to_json())
    handle = mixkvq.attach(model, calibration=path)
    path.unlink()
    written(model)
    assert handle.cache.mixkvq_config.value_bits == 8


# ---- what it leaves alone ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}]
)
def test_who_asks_for_something_else_gets_it(model, options):
    want = written(model, **options)
    with mixkvq.attach(model, "kivi-2", **SHORT) as handle:
        assert torch.equal(written(model, **options), want)
    assert handle.made == 0 and handle.cache is None


def test_a_cache_that_is_passed_is_used(model):
    cache = DynamicCache(config=model.config)
    with mixkvq.attach(model, "kivi-2") as handle:
        written(model, **cache_argument(cache))
    assert handle.made == 0 and cache.get_seq_length() == 90 + 39


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_the_older_name_of_the_argument_counts_too(model):
    cache = DynamicCache(config=model.config)
    with mixkvq.attach(model, "kivi-2") as handle:
        written(model, past_key_values=cache)
    assert handle.made == 0 and cache.get_seq_length() == 90 + 39


def test_calls_of_the_model_itself_are_exact(model):
    want = model(INPUTS["input_ids"]).logits
    with mixkvq.attach(model, "kivi-2", **SHORT) as handle:
        assert torch.equal(model(INPUTS["input_ids"]).logits, want)
    assert handle.made == 0


def test_other_models_of_the_class_are_left_alone(model):
    other = copy.deepcopy(model)
    exact = written(other)
    with mixkvq.attach(model, "kivi-2", **SHORT) as handle:
        assert torch.equal(written(other), exact) and handle.made == 0
        assert not torch.equal(written(model), exact) and handle.made == 1


def test_nothing_is_written_to_the_model(model):
    before, names = dict(vars(model)), set(vars(type(model)))
    with mixkvq.attach(model):
        assert vars(model) == before and set(vars(type(model))) == names
    assert vars(model) == before


def test_copies_are_not_attached_and_can_be_made(model, tmp_path):
    exact = written(model)
    with mixkvq.attach(model, "kivi-2", **SHORT) as handle:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        model.save_pretrained(tmp_path)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
            LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        ]
        for made in copies:
            made.generation_config.eos_token_id = None
            assert torch.equal(written(made), exact)
        assert handle.made == 0


def test_an_attached_model_is_let_go():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    gone, handle = weakref.ref(model), mixkvq.attach(model)
    del model
    gc.collect()
    assert gone() is None and not handle.attached
    handle.detach()


# ---- several at once -----------------------------------------------------------------------------------------------
def test_the_newest_holds_until_it_is_detached_in_any_order(model):
    outer = mixkvq.attach(model, "lossless")
    inner = mixkvq.attach(model, "compact")
    written(model)
    assert (outer.made, inner.made) == (0, 1)
    inner.detach()
    written(model)
    assert (outer.made, inner.made) == (1, 1)
    newest = mixkvq.attach(model)
    outer.detach()
    outer.detach()
    written(model)
    assert (outer.made, newest.made) == (1, 1) and newest.attached and not outer.attached
    newest.detach()
    written(model)
    assert newest.made == 1


def test_detach_ends_all(model):
    handles = [mixkvq.attach(model, preset) for preset in ("default", "compact")]
    mixkvq.detach(model)
    mixkvq.detach(model)
    assert not any(handle.attached for handle in handles) and "detached from" in repr(handles[0])
    written(model)
    assert [handle.made for handle in handles] == [0, 0]


def test_an_exception_detaches(model):
    with pytest.raises(RuntimeError, match="inside"), mixkvq.attach(model) as handle:
        raise RuntimeError("inside")
    assert not handle.attached


def test_two_models(model):
    other = copy.deepcopy(tiny(seed=1))
    want = [by_hand(model, "default")[0], by_hand(other, "compact")[0]]
    with mixkvq.attach(model, **SHORT), mixkvq.attach(other, "compact", **SHORT):
        assert torch.equal(written(model), want[0]) and torch.equal(written(other), want[1])


def test_threads_have_caches_of_their_own(model):
    lengths = (90, 71, 53, 60)
    want = [by_hand(model, inputs=prompts([n]))[0] for n in lengths]
    got = {}

    def run(n):
        for _ in range(3):
            got.setdefault(n, []).append(written(model, prompts([n])))

    with mixkvq.attach(model, **SHORT) as handle:
        threads = [threading.Thread(target=run, args=(n,)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n, tokens in zip(lengths, want, strict=True):
        assert len(got[n]) == 3 and all(torch.equal(one, tokens) for one in got[n])
    assert handle.cache.report().layers[0].tokens - 39 in lengths


# ---- programs that have no cache argument --------------------------------------------------------------------------
TEXT = "The quick brown fox jumps over the lazy dog. " * 5


def test_a_pipeline():
    model, tokenizer = byte_model()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    texts = [TEXT, TEXT[30:], TEXT[:150]]
    tokenizer.padding_side = "left"
    for batch in (1, 3):
        exact = pipe(texts, batch_size=batch, **options)
        with mixkvq.attach(model, "lossless") as handle:
            assert pipe(texts, batch_size=batch, **options) == exact
            assert handle.made == 3 // batch
            assert {layer.path for layer in handle.cache.report().layers} == {"packed"}
        with mixkvq.attach(model, "kivi-2") as handle:
            assert pipe(texts, batch_size=batch, **options) != exact and handle.made == 3 // batch


def test_the_harness():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = byte_model()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=1024)
    asked = [
        Instance("generate_until", {}, (text, {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}), i)
        for i, text in enumerate([TEXT, TEXT[40:], TEXT[:160]])
    ]
    pairs = [Instance("loglikelihood", {}, (TEXT, " And then?"), 0)]
    exact, likely = lm.generate_until(asked, disable_tqdm=True), lm.loglikelihood(pairs, disable_tqdm=True)
    with mixkvq.attach(model, "lossless") as handle:
        assert lm.generate_until(asked, disable_tqdm=True) == exact and handle.made == 2
        assert {layer.path for layer in handle.cache.report().layers} == {"packed"}
    with mixkvq.attach(model, "kivi-2") as handle:
        assert lm.generate_until(asked, disable_tqdm=True) != exact
        assert lm.loglikelihood(pairs, disable_tqdm=True) == likely and handle.made == 2  # no cache: as without


class Adapted(torch.nn.Module):
    """As PEFT wraps a model: `generate` of its own, that of the model inside in the end."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)


def test_wrapped_models(model):
    want, _ = by_hand(model)
    for wrapper in (Adapted(model), torch.compile(model, backend="eager")):
        with mixkvq.attach(wrapper, **SHORT) as handle:
            assert torch.equal(wrapper.generate(**INPUTS, max_new_tokens=40, do_sample=False), want)
            assert handle.made == 1


# ---- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "options", "error", "message"),
    [
        ("defualt", {}, ValueError, "unknown preset 'defualt'"),
        ("default", {"sinks": 3}, TypeError, "unknown field 'sinks'"),
        ("default", {"precision": "high"}, ValueError, "precision"),
        ("default", {"config": None}, TypeError, "config is given, must not be"),
        ("default", {"ddp_cache_data": []}, TypeError, "ddp_cache_data is given, must not be"),
        ("default", {"calibration": Calibration("llama-1", "default")}, ValueError, "calibration is for llama-1"),
    ],
)
def test_wrong_options_are_refused_at_once(model, preset, options, error, message):
    with pytest.raises(error, match=message):
        mixkvq.attach(model, preset, **options)
    mixkvq.detach(model)
    assert written(model).shape == (2, 130)


@pytest.mark.parametrize("thing", ["llama", None, torch.nn.Linear(2, 2)])
def test_what_cannot_generate(thing):
    with pytest.raises(TypeError, match=r"model is .*, must be a model of transformers that has generate\(\)"):
        mixkvq.attach(thing)


def test_a_model_without_a_head(model):
    with pytest.raises(TypeError, match="model is a LlamaModel, must be a model of transformers that has"):
        mixkvq.attach(model.model)


def test_models_with_caches_of_their_own(model, monkeypatch):
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda cls: False))
    with pytest.raises(TypeError, match="LlamaForCausalLM, must be one whose"):
        mixkvq.attach(model)
    monkeypatch.undo()
    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", lambda self, *_: None, raising=False)
    with pytest.raises(TypeError, match="LlamaForCausalLM, must be one whose"):
        mixkvq.attach(model)


@pytest.mark.parametrize(("name", "value"), [("cache_implementation", "static"), ("use_cache", False)])
def test_a_model_that_asks_for_another_cache(model, name, value):
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"generation_config.{name} is {value!r}, must be None"):
        mixkvq.attach(model)


def test_heads_that_cannot_be_spread(model):
    model._tp_size = 3
    with pytest.raises(ValueError, match="num_key_value_heads is 2 and tp_size is 3"):
        mixkvq.attach(model)


def test_the_method_is_wrapped_once(model):
    mixkvq.attach(model).detach()
    first = GenerationMixin._prepare_cache_for_generation
    mixkvq.attach(model).detach()
    assert GenerationMixin._prepare_cache_for_generation is first
