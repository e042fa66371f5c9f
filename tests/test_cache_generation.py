"""Everything else that `generate` and people do with a cache, lossless, against `DynamicCache`."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import VOCABULARY, assert_same_tokens, forward, generate, lossless, paths, prompts, relative_gap, tiny
from transformers import DynamicCache
from versions import kernel_path, needs_eager, with_stock_cache

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument

FAMILIES = [
    ("llama", "sdpa"),
    ("qwen3", "eager"),
    ("gemma2", "eager"),
    ("gpt_oss", "eager"),
    ("phi3", "sdpa"),
    ("bloom", "eager"),
]


@pytest.fixture(params=FAMILIES, ids=[name for name, _ in FAMILIES])
def model(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bloom is decoded in every step and says so
        yield tiny(*request.param)


def stock(model) -> DynamicCache:
    return DynamicCache(config=model.config)


def both(model, inputs, new_tokens=24, **options):
    cache = lossless()
    want = with_stock_cache(lambda: generate(model, inputs, stock(model), new_tokens, **options))
    assert_same_tokens(want, generate(model, inputs, cache, new_tokens, **options))
    assert any(path != "native" for path in paths(cache))
    return cache


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
        {"prefill_chunk_size": 16},
        {"prefill_chunk_size": 33},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_generate_options(model, options):
    both(model, prompts([90, 53]), **options)


def test_prompt_lookup_rolls_back(model):
    ids = prompts([30])["input_ids"].repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 5, "eos_token_id": VOCABULARY}  # older versions must have one
    cache = both(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)
    assert all(layer.get_seq_length() == 90 + 23 for layer in cache.layers)


def test_an_assistant_proposes(model):
    both(model, prompts([70]), assistant_model=model)


def test_sampling(model):
    inputs = prompts([80, 61])
    results = []
    for cache in (stock(model), lossless()):
        torch.manual_seed(3)
        results.append(
            model.generate(**inputs, **cache_argument(cache), max_new_tokens=24, do_sample=True, num_return_sequences=2)
        )
    assert torch.equal(*results)


def test_several_turns_on_one_cache(model):
    caches = stock(model), lossless()
    ids = [prompts([50])["input_ids"]] * 2
    for turn in range(3):
        got = [
            generate(model, {"input_ids": i, "attention_mask": torch.ones_like(i)}, c, 20)
            for i, c in zip(ids, caches, strict=True)
        ]
        assert_same_tokens(*got)
        ids = [torch.cat([got[0].sequences, prompts([30], seed=turn + 5)["input_ids"]], 1)] * 2


def test_token_by_token_from_the_first(model):
    ids = prompts([90])["input_ids"]
    caches = stock(model), lossless()
    for t in range(90):
        a, b = (forward(model, cache, ids[:, t : t + 1]) for cache in caches)
        assert relative_gap(b, a) < 1e-5


def test_pieces_of_every_size(model):
    ids, at = prompts([200])["input_ids"], 0
    caches = stock(model), lossless()
    for piece in (1, 40, 2, 33, 64, 1, 7, 31, 21):
        a, b = (forward(model, cache, ids[:, at : at + piece]) for cache in caches)
        assert relative_gap(b, a) < 1e-5
        at += piece
    assert at == 200


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


def test_right_padding_and_holes():
    """Masked tokens after the first real one are stored and stay masked."""
    model, ids = tiny("llama"), prompts([100, 100])["input_ids"]
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, 70:] = 0
    mask[1, :10] = 0
    mask[1, 30:40] = 0
    caches = DynamicCache(), lossless()
    a, b = (forward(model, cache, ids, mask) for cache in caches)
    assert relative_gap(b[mask.bool()], a[mask.bool()]) < 1e-5
    for step in range(40):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        a, b = (forward(model, cache, ids[:, step : step + 1], mask) for cache in caches)
        assert relative_gap(b, a) < 1e-5
    assert caches[1].layers[0].store.start.tolist() == [0, 10] and caches[1].layers[0].dequantizations == 0


def test_custom_masks():
    """A prefix that sees itself both ways, and a 4-dimensional mask of the user's own."""
    model, ids = tiny("llama"), prompts([80, 80])["input_ids"]
    mask = torch.ones(80, 80, dtype=torch.bool).tril()
    mask[:20, :20] = True
    mask = mask.expand(2, 1, 80, 80).clone()
    mask[1, :, :, :7] = False
    caches = DynamicCache(), lossless()
    a, b = (forward(model, cache, ids, mask) for cache in caches)
    assert relative_gap(b[:, 7:], a[:, 7:]) < 1e-5
    step = torch.ones(2, 1, 3, 83, dtype=torch.bool).tril(80)
    step[1, :, :, :7] = False
    a, b = (forward(model, cache, ids[:, :3], step) for cache in caches)
    assert relative_gap(b, a) < 1e-5
    assert caches[1].layers[0].store.start.tolist() == [0, 7] and caches[1].layers[0].dequantizations == 0


def test_embeddings_instead_of_tokens():
    model, inputs = tiny("llama"), prompts([70, 40])
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    want = generate(model, embedded, DynamicCache(), 20)
    assert torch.equal(generate(model, embedded, lossless(), 20).sequences, want.sequences)


def test_inference_mode_at_some_steps():
    model, ids = tiny("llama"), prompts([150])["input_ids"]
    caches, at = (DynamicCache(), lossless()), 0
    for step, piece in enumerate((60, 30, 1, 40, 19)):
        with torch.inference_mode(step % 2 == 0):
            a, b = (forward(model, cache, ids[:, at : at + piece]) for cache in caches)
            assert relative_gap(b, a) < 1e-5
        at += piece


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
def test_gradients_are_those_of_the_stock_cache():
    model, ids = tiny("llama"), prompts([90])["input_ids"]
    gradients = []
    for cache in (DynamicCache(), lossless()):
        model.zero_grad()
        model(input_ids=ids[:, :60], **cache_argument(cache))
        model(input_ids=ids[:, 60:], **cache_argument(cache)).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(layer.path == "native" and "gradients" in layer.reason for layer in cache.report().layers)


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


# ---- several at once -----------------------------------------------------------------------------------------------
def test_two_models_interleaved():
    models, ids = (tiny("llama"), tiny("qwen3")), prompts([120])["input_ids"]
    caches = [(DynamicCache(), lossless()) for _ in models]
    for begin, end in ((0, 50), (50, 51), (51, 90), *((t, t + 1) for t in range(90, 120))):
        for model, pair in zip(models, caches, strict=True):
            a, b = (forward(model, cache, ids[:, begin:end]) for cache in pair)
            assert relative_gap(b, a) < 1e-5


def test_threads_with_a_cache_each():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny("llama")
    jobs = [prompts([70 + i, 30], seed=i) for i in range(4)]
    want = [generate(model, job, DynamicCache(), 20).sequences for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: generate(model, job, lossless(), 20).sequences, jobs))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_used_cache_can_be_reset_and_used_with_another_batch_size(model):
    cache = lossless()
    generate(model, prompts([60, 45]), cache, 5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.report().nbytes == 0
    inputs = prompts([70, 52, 33], seed=8)
    want = generate(model, inputs, stock(model), 10)
    assert_same_tokens(want, generate(model, inputs, cache, 10))


def test_the_model_config_gives_the_same_as_learning_it(model):
    inputs = prompts([80, 41])
    learned, given = lossless(), lossless(config=model.config)
    a, b = (generate(model, inputs, cache, 10) for cache in (learned, given))
    assert torch.equal(a.sequences, b.sequences)
    if kernel_path(model.config._attn_implementation) == "packed":  # else no attention call tells the layout
        assert [type(x) for x in learned.layers] == [type(x) for x in given.layers] and paths(learned) == paths(given)


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
