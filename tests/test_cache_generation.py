"""What layers know after what people do with a cache: starts, dtypes, reasons. What comes out: see `scenarios`."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import FAMILIES
from models import forward, generate, lossless, paths, prompts, relative_gap, tiny
from scenarios import SCENARIOS, Case
from torch.autograd import forward_ad
from transformers import DynamicCache
from versions import needs_eager

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument


def test_a_row_of_padding_only_holds_packing_back():
    """Until every row has a real token nothing is packed; then rows begin where their first token is."""
    model, cache, expected = tiny("llama"), lossless(), DynamicCache()
    ids, mask = prompts([120])["input_ids"].repeat(2, 1), torch.ones(2, 120, dtype=torch.long)
    mask[1, :60] = 0
    for begin, end in ((0, 50), (50, 90), (90, 120)):
        a, b = (forward(model, c, ids[:, begin:end], mask[:, :end]) for c in (expected, cache))
        real = mask[:, begin:end].bool()
        assert relative_gap(b[real], a[real]) < 1e-5
        if end == 50:
            assert paths(cache) == ["native"] * 2 and "no real token" in cache.report().layers[0].reason
    assert cache.layers[0].store.start.tolist() == [0, 60]


@pytest.mark.parametrize(
    "scenario, starts",
    [
        ("right_padding_and_holes", [0, 10]),
        ("own_bool_masks", [0, 7]),
        ("own_additive_masks", [0, 7]),
        ("own_mild_additive_masks", [0, 7]),
    ],
)
def test_masks_tell_where_rows_begin(scenario, starts):
    """And keys that they hide are served by the kernel."""
    case = Case(FAMILIES["llama"], "sdpa")
    SCENARIOS[scenario](case)
    for cache in case.caches:
        assert all(layer.store.start.tolist() == starts and layer.dequantizations == 0 for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(family):
    """A float32 model then has float32 keys and bfloat16 values, and computes attention with both in bfloat16."""
    model, inputs = tiny(family), prompts([90, 70])
    with torch.autocast("cpu", torch.bfloat16):
        want, cache = generate(model, inputs, DynamicCache(), 8), lossless()
        got = generate(model, inputs, cache, 8)
    assert float((want.logits[0] - got.logits[0]).abs().max()) == 0
    assert relative_gap(got.logits[1], want.logits[1]) < 0.05
    assert paths(cache) == ["packed"] * 2 and cache.layers[0].store.k.dtype == torch.bfloat16
    assert all(layer.dequantizations == 0 for layer in cache.layers)


@pytest.mark.parametrize("tokens", [20, 90])
@pytest.mark.parametrize("first", [True, False])
def test_autocast_for_the_prompt_or_for_later_tokens_only(first, tokens):
    model, inputs = tiny("llama"), prompts([tokens, tokens - 11])
    plain, cache = DynamicCache(), lossless()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, ids in enumerate([inputs["input_ids"], *torch.arange(2, 82).view(40, 2, 1)]):
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=first == (step == 0)):
                want, got = (forward(model, each, ids, mask) for each in (plain, cache))
            assert relative_gap(got, want) < 0.05 and got.dtype == want.dtype
    falls = first and tokens == 90
    assert paths(cache) == (["native"] * 2 if falls else ["packed"] * 2)
    if falls:
        assert "follow on records of torch.bfloat16" in cache.layers[0].reason.what


@needs_eager
def test_attention_weights_and_hidden_states_are_as_ever():
    model, inputs = tiny("llama", "eager"), prompts([60])
    options = {"output_attentions": True, "output_hidden_states": True}
    want = generate(model, inputs, DynamicCache(), 4, **options)
    cache = lossless()
    with pytest.warns(UserWarning, match="attention weights are wanted"):
        got = generate(model, inputs, cache, 4, **options)
    for a, b in zip(want.attentions, got.attentions, strict=True):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert torch.equal(want.sequences, got.sequences) and paths(cache) == ["packed", "packed"]
    before = [layer.dequantizations for layer in cache.layers]
    step = {"input_ids": got.sequences, "attention_mask": torch.ones_like(got.sequences)}
    generate(model, step, cache, 4)
    assert [layer.dequantizations for layer in cache.layers] == before, "without weights it goes on packed"


# ---- training ------------------------------------------------------------------------------------------------------
def test_gradients_of_queries_only():
    """As a LoRA on q_proj alone: keys of the first layer look frozen."""
    model, ids = tiny("llama", seed=3), prompts([60])["input_ids"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    try:
        cache = lossless()
        model(input_ids=ids, **cache_argument(cache)).logits.sum().backward()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
    assert all(layer.path == "native" and "gradients" in layer.reason for layer in cache.report().layers)


def test_gradients_after_packing_go_on_in_full_precision():
    model, ids = tiny("llama"), prompts([90])["input_ids"]
    cache = lossless()
    forward(model, cache, ids[:, :60])
    assert paths(cache) == ["packed", "packed"]
    with pytest.warns(UserWarning, match="full precision: gradients"):
        model(input_ids=ids[:, 60:], **cache_argument(cache)).logits.sum().backward()
    assert paths(cache) == ["native", "native"] and model.lm_head.weight.grad.isfinite().all()
    model.zero_grad()
    assert (
        relative_gap(
            forward(model, cache, ids[:, :1]), forward(model, DynamicCache(), torch.cat([ids, ids[:, :1]], 1))[:, -1:]
        )
        < 1e-5
    )


@pytest.mark.parametrize("tokens", [20, 90])
@pytest.mark.parametrize("what", ["everything", "keys and values", "queries"])
def test_tangents_of_forward_differentiation_are_kept(tokens, what):
    """Of the input, or of one projection of the last layer's."""
    model, ids = tiny("llama", "eager"), prompts([tokens])["input_ids"]
    embedded = model.get_input_embeddings()(torch.tensor([[5]])).detach()
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))

    def projected(module, args, output):
        return forward_ad.make_dual(output, torch.ones_like(output))

    def tangent(cache):
        forward(model, cache, ids)
        with torch.no_grad(), forward_ad.dual_level():
            if what == "everything":
                given = forward_ad.make_dual(embedded, direction)
                return forward_ad.unpack_dual(model(inputs_embeds=given, **cache_argument(cache)).logits).tangent
            attention = model.model.layers[-1].self_attn
            names = ["q_proj"] if what == "queries" else ["k_proj", "v_proj"]
            hooks = [getattr(attention, name).register_forward_hook(projected) for name in names]
            try:
                return forward_ad.unpack_dual(model(input_ids=ids[:, :1], **cache_argument(cache)).logits).tangent
            finally:
                for hook in hooks:
                    hook.remove()

    want = tangent(DynamicCache())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = tangent(lossless())
    assert want.norm() > 0 and relative_gap(got, want) < 1e-5


def test_more_bits_come_closer_to_the_exact_cache():
    """A random model is chaotic, so the presets are judged on real ones; here the error must fall with the bits."""
    model, ids = tiny("llama", initializer_range=0.1), prompts([400])["input_ids"]
    exact, gaps = DynamicCache(), []
    forward(model, exact, ids)
    want = forward(model, exact, ids[:, :5])
    for bits in (2, 4, 8):
        cache = MixKVQCache(key_patterns={bits: 64}, value_bits=bits)
        forward(model, cache, ids)
        gaps.append(float((forward(model, cache, ids[:, :5]) - want).norm() / want.norm()))
        assert paths(cache) == ["packed", "packed"]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0, gaps
