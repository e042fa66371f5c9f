"""Which path the layers of a few families take, and that it gives the tokens of `DynamicCache`."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import assert_same_tokens, generate, lossless, prompts, tiny
from transformers import DynamicCache
from versions import kernel_path, needs_eager, with_stock_cache

from mixkvq.compat import cache_argument

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
