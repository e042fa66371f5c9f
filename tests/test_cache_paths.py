"""Why layers take their path. Which one it is, and that it gives what `DynamicCache` gives: see `scenarios`."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import FAMILIES
from models import forward, generate, lossless, prompts, relative_gap, tiny
from transformers import DynamicCache, EncoderDecoderCache
from versions import needs_eager, needs_linear

from mixkvq.compat import cache_argument
from mixkvq.layer import MixKVQLayer

REASONS = {
    "bloom": "does not pass through transformers' AttentionInterface",
    "deepseek_v3": "differ in shape, as latent (MLA) attention does",
    "mistral": "transformers' DynamicSlidingWindowLayer",
    "qwen3_next": "transformers' LinearAttentionLayer",
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=needs_linear) if name == "qwen3_next" else name for name in REASONS]
)
def test_reason(family):
    about = FAMILIES[family]
    if absent := about.absent(about.attention[0]):
        pytest.skip(absent)
    cache = lossless()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(tiny(family, about.attention[0]), prompts([100, 63]), cache, 3)
    assert REASONS[family] in str(cache.report().layers[0].reason)


@needs_eager
def test_soft_cap_and_sinks_are_found():
    for family, variant in (("gemma2", (True, False)), ("gpt_oss", (False, True))):
        cache = lossless()
        generate(tiny(family, "eager"), prompts([100]), cache, 3)
        proof = cache.layers[1].proof
        assert (proof.softcap, proof.sinks) == variant


@needs_eager
def test_a_layout_that_comes_late_is_not_taken(monkeypatch):
    """A compiled prompt does not show the layout, and masks of a later pass are made for the layers as they are."""
    model, ids = tiny("gemma2", "eager", num_hidden_layers=4, layer_types=None), prompts([80])["input_ids"]
    expected, cache = DynamicCache(config=model.config), lossless()
    for begin, end in ((0, 60), *((i, i + 1) for i in range(60, 80))):
        for module in ("cache", "lookup"):
            monkeypatch.setattr(f"mixkvq.{module}.is_compiling", lambda compiled=begin == 0: compiled)
        want, got = (forward(model, c, ids[:, begin:end]) for c in (expected, cache))
        assert relative_gap(got, want) < 1e-5
    assert {type(layer) for layer in cache.layers} == {MixKVQLayer} and cache.layers[0].store.blocks.tolist() == [2]


@needs_eager
def test_a_layout_that_comes_after_something_was_packed(monkeypatch):
    """In the first pass, when the attention of the first layer was not seen: what it decodes to is taken over."""
    model, ids = tiny("gemma2", "eager", seed=9, num_hidden_layers=4, layer_types=None), prompts([80])["input_ids"]
    expected, cache, attention = DynamicCache(config=model.config), lossless(), model.model.layers[0].self_attn
    forward_of_first = attention.forward

    def unseen(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr("mixkvq.lookup.is_compiling", lambda: True)
            return forward_of_first(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", unseen)
    for begin, end in ((0, 60), *((i, i + 1) for i in range(60, 80))):
        want, got = (forward(model, c, ids[:, begin:end]) for c in (expected, cache))
        assert relative_gap(got, want) < 1e-5
    assert [type(a) for a in cache.layers[::2]] == [type(a) for a in expected.layers[::2]]


def test_cross_attention_with_more_queries_than_padded_keys():
    """No good place for our cache, but tokens are right."""
    model, texts, ids = tiny("t5", "eager"), prompts([34, 30], seed=3), prompts([50, 50])["input_ids"]
    logits = []
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), EncoderDecoderCache(lossless(), lossless(8))):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # decoded in every step
            for piece in (ids, ids[:, :1]):
                logits.append(model(**texts, decoder_input_ids=piece, **cache_argument(cache)).logits)
    assert torch.allclose(logits[0], logits[2], atol=1e-4) and torch.allclose(logits[1], logits[3], atol=1e-4)
