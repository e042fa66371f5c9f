"""Which path the layers of a few families take, and that it gives the tokens of `DynamicCache`."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import assert_same_tokens, forward, generate, lossless, prompts, relative_gap, tiny
from transformers import DynamicCache
from versions import kernel_path, needs_eager, with_stock_cache

from mixkvq.compat import cache_argument
from mixkvq.layer import MixKVQLayer

PACKED, NATIVE, DECODED = "packed", "native", "dequantized"
CASES = [
    ("llama", "sdpa", [PACKED, PACKED]),
    ("llama", "eager", [PACKED, PACKED]),
    ("qwen3", "eager", [PACKED, PACKED]),
    ("phi3", "sdpa", [PACKED, PACKED]),
    ("gemma2", "eager", [NATIVE, PACKED]),
    ("gpt_oss", "eager", [NATIVE, PACKED]),
    ("mistral", "sdpa", [NATIVE, NATIVE]),
    ("bloom", "eager", [DECODED, DECODED]),
    ("deepseek_v3", "sdpa", [NATIVE, NATIVE]),
    ("qwen3_next", "sdpa", [NATIVE, PACKED]),
]
REASONS = {
    "bloom": "does not pass through transformers' AttentionInterface",
    "deepseek_v3": "differ in shape, as latent (MLA) attention does",
    "mistral": "transformers' DynamicSlidingWindowLayer",
    "qwen3_next": "transformers' LinearAttentionLayer",
}


@pytest.mark.parametrize("family, attention, paths", CASES)
@pytest.mark.parametrize("given", [False, True], ids=["learned", "config"])
def test_path(family, attention, paths, given):
    model, inputs = tiny(family, attention), prompts([100, 63])
    cache = lossless(config=model.config if given else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = with_stock_cache(lambda: generate(model, inputs, DynamicCache(config=model.config), 12))
        got = generate(model, inputs, cache, 12)
    assert_same_tokens(want, got)
    layers = cache.report().layers
    if kernel_path(attention) == DECODED:  # no attention call tells which layers have windows, only `config`
        paths = [DECODED if path == PACKED or not given else path for path in paths]
    assert [layer.path for layer in layers] == paths
    if family in REASONS:
        assert REASONS[family] in layers[0].reason
    for layer in layers:
        if layer.path == PACKED:
            assert layer.dequantizations == 0 and layer.record_bytes > 0
        if layer.path == DECODED:
            assert layer.dequantizations == 11 and layer.record_bytes > 0


@needs_eager
def test_soft_cap_and_sinks_are_found():
    for family, variant in (("gemma2", (True, False)), ("gpt_oss", (False, True))):
        cache = lossless()
        generate(tiny(family, "eager"), prompts([100]), cache, 3)
        proof = cache.layers[1].proof
        assert (proof.softcap, proof.sinks) == variant


@pytest.mark.slow
def test_compiled_models_are_right():
    """A compiled model gets plain or decoded tensors; eager prefill and compiled decode too."""
    model, inputs = tiny("llama", seed=5), prompts([70, 50])
    want = generate(model, inputs, DynamicCache(), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager")
        for eager_prefill in (False, True):
            cache = lossless()
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            with torch.no_grad():
                logits = (model if eager_prefill else compiled)(
                    input_ids=ids, attention_mask=mask, **cache_argument(cache)
                ).logits[:, -1:]
                for step in range(1, 10):
                    assert torch.allclose(logits[:, -1], want.logits[step - 1], atol=1e-4)
                    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                    logits = compiled(
                        input_ids=logits[:, -1:].argmax(-1), attention_mask=mask, **cache_argument(cache)
                    ).logits


def test_a_layout_that_comes_late_is_not_taken(monkeypatch):
    """A compiled prompt does not show the layout, and masks of a later pass are made for the layers as they are."""
    model, ids = tiny("gemma2", "eager", num_hidden_layers=4), prompts([80])["input_ids"]
    expected, cache = DynamicCache(config=model.config), lossless()
    for begin, end in ((0, 60), *((i, i + 1) for i in range(60, 80))):
        for module in ("cache", "lookup"):
            monkeypatch.setattr(f"mixkvq.{module}.is_compiling", lambda compiled=begin == 0: compiled)
        want, got = (forward(model, c, ids[:, begin:end]) for c in (expected, cache))
        assert relative_gap(got, want) < 1e-5
    assert {type(layer) for layer in cache.layers} == {MixKVQLayer} and cache.layers[0].store.blocks.tolist() == [2]


def test_a_layout_that_comes_after_something_was_packed(monkeypatch):
    """In the first pass, when the attention of the first layer was not seen: what it decodes to is taken over."""
    model, ids = tiny("gemma2", "eager", seed=9, num_hidden_layers=4), prompts([80])["input_ids"]
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
