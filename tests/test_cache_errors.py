"""Errors name the argument, its value and what is allowed, and leave the cache as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import forward, generate, lossless, prompts, tiny
from transformers import LlamaConfig

from mixkvq import MixKVQCache, MixKVQConfig, compat


def states(batch=2, heads=2, tokens=5, dim=16, **options):
    return torch.randn(batch, heads, tokens, dim, **options)


# ---- the constructor -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        (("defualt",), {}, ValueError, ["defualt", "did you mean 'default'"]),
        ((), {"sink_lenght": 3}, TypeError, ["sink_lenght", "did you mean 'sink_length'"]),
        ((), {"value_bits": 5}, ValueError, ["value_bits is 5", "1, 2, 3, 4, 8, 16"]),
        ((), {"key_patterns": {5: 64}}, ValueError, ["5 bits", "1, 2, 3, 4, 8, 16"]),
        ((), {"block_length": 100, "key_group_size": 32}, ValueError, ["block_length is 100", "multiple of 32"]),
        ((), {"block_length": 96}, ValueError, ["block_length is 96", "multiple of key_group_size (64)"]),
        ((), {"residual_length": 64}, ValueError, ["residual_length is 64", "block_length <= residual_length"]),
        ((), {"precision": "half"}, ValueError, ["precision is 'half'", "'default', 'exact', 'fast'"]),
        ((LlamaConfig(),), {}, TypeError, ["LlamaConfig", "MixKVQCache(config=...)"]),
        ((), {"offloading": True}, ValueError, ["offloading is True, must be False", "device"]),
        ((3,), {}, TypeError, ["preset is 3", "must be the name of a preset or a MixKVQConfig"]),
        (([(1, 2)],), {}, TypeError, ["key_states is int"]),
        (([3],), {}, TypeError, ["ddp_cache_data has 3 for layer 0", "(keys, values)"]),
        ((["default"],), {"ddp_cache_data": []}, TypeError, ["preset is ['default']"]),
        ((None,), {}, TypeError, ["preset is None"]),
        ((), {"config": "llama"}, TypeError, ["config is 'llama'", "model.config"]),
    ],
)
def test_constructor(arguments, options, error, words):
    with pytest.raises(error) as caught:
        MixKVQCache(*arguments, **options)
    for word in words:
        assert word in str(caught.value)


def test_arguments_of_the_stock_cache_are_taken():
    assert len(MixKVQCache(ddp_cache_data=None, config=tiny("llama").config, offloading=False)) == 2


def test_a_configuration_may_be_overridden():
    config = MixKVQConfig.preset("compact", sink_length=8)
    assert MixKVQCache(config, residual_length=256).mixkvq_config == config.replace(residual_length=256)
    assert MixKVQCache(precision="exact").precision == "exact"


# ---- update --------------------------------------------------------------------------------------------------------
UPDATES = {
    "not a tensor": (lambda: ([1.0], states()), TypeError, ["key_states is list", "must be a tensor"]),
    "none": (lambda: (states(), None), TypeError, ["value_states is NoneType"]),
    "device": (lambda: (states(), states(device="meta")), ValueError, ["value_states is on meta", "cpu"]),
    "tokens": (lambda: (states(), states(tokens=4)), ValueError, ["[2, 2, 4, 16]", "[2, 2, 5, 16]"]),
    "batch of values": (lambda: (states(), states(batch=1)), ValueError, ["[1, 2, 5, 16]", "[2, 2, 5, 16]"]),
    "dimensions": (lambda: (torch.zeros(5, 16), torch.zeros(5, 16)), ValueError, ["[5, 16]"]),
}
CHANGES = {
    "batch": (lambda: (states(batch=3),) * 2, ["[3, 2, 5, 16]", "[2, 2, n, 16]"]),
    "heads": (lambda: (states(heads=4),) * 2, ["[2, 4, 5, 16]", "[2, 2, n, 16]"]),
    "head_dim": (lambda: (states(dim=32),) * 2, ["[2, 2, 5, 32]", "[2, 2, n, 16]"]),
    "device": (lambda: (states(device="meta"),) * 2, ["meta", "must be on cpu"]),
    "whole numbers": (lambda: (states().long(),) * 2, ["key_states is torch.int64", "must be floating point"]),
    "bool": (lambda: (states(), states().bool()), ["value_states is torch.bool", "must be floating point"]),
}


def snapshot(cache):
    return [(layer.length, layer.mode, layer.epoch, [t.clone() for t in layer.tensors()]) for layer in cache.layers]


def assert_unchanged(cache, before):
    after = snapshot(cache)
    assert len(before) == len(after)
    for (*a, had), (*b, has) in zip(before, after, strict=True):
        assert a == b and all(torch.equal(x, y) for x, y in zip(had, has, strict=True))


def caches():
    """An empty cache, a plain one, and one with two packed layers; batch 2, 2 heads of 16."""
    model, inputs = tiny("llama"), prompts([60, 50])
    plain, packed = MixKVQCache(), lossless()
    for cache in (plain, packed):
        forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    return {"empty": MixKVQCache(), "plain": plain, "packed": packed}


@pytest.mark.parametrize("state", ["empty", "plain", "packed"])
@pytest.mark.parametrize("name", UPDATES)
def test_update_with_what_does_not_belong_together(state, name):
    make, error, words = UPDATES[name]
    cache = caches()[state]
    before = snapshot(cache)
    with pytest.raises(error) as caught:
        cache.update(*make(), 1)
    assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(cache, before)


@pytest.mark.parametrize("state", ["plain", "packed"])
@pytest.mark.parametrize("name", CHANGES)
def test_update_with_what_does_not_continue(state, name):
    make, words = CHANGES[name]
    cache = caches()[state]
    before = snapshot(cache)
    with pytest.raises((TypeError, ValueError)) as caught:
        cache.update(*make(), 0)
    assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(cache, before)


@pytest.mark.parametrize("index, error", [(-1, IndexError), ("0", TypeError), (None, TypeError), (1.0, TypeError)])
def test_update_with_a_wrong_layer_index(index, error):
    cache = caches()["packed"]
    before = snapshot(cache)
    with pytest.raises(error, match="layer_idx is"):
        cache.update(states(), states(), index)
    assert_unchanged(cache, before)


def test_layers_out_of_order():
    """Made on demand, as in DynamicCache(); with a configuration the number of layers is known."""
    cache = MixKVQCache()
    cache.update(states(), states(), 5)
    assert len(cache) == 6 and cache.get_seq_length(5) == 5 and cache.get_seq_length(3) == 0
    assert cache.get_seq_length() == 5, "of the first layer that has tokens"
    cache.update(states(tokens=3), states(tokens=3), 2)
    assert cache.get_seq_length(2) == 3
    known = MixKVQCache(config=tiny("llama").config)
    assert len(known) == 2
    with pytest.raises(IndexError, match="layer_idx is 2, must be below 2"):
        known.update(states(), states(), 2)
    assert len(known) == 2


# ---- not errors: full precision, with the reason -------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: (states(dim=20, tokens=300),) * 2, "head_dim is 20, must be a multiple of 8"),
        (lambda: (states(dim=264, tokens=300),) * 2, "head_dim is 264"),
        (lambda: (states(tokens=300).double(),) * 2, "float64"),
        (lambda: (states(tokens=300), states(tokens=300, dim=24)), "differ in shape"),
        (lambda: (states(tokens=300, device="meta"),) * 2, "no packed kernels for meta"),
        (lambda: (states(tokens=300), states(tokens=300).bfloat16()), "outside autocast"),
        (lambda: (states(tokens=300).requires_grad_(),) * 2, "gradients are required"),
    ],
)
def test_what_records_cannot_hold_stays_in_full_precision(make, reason):
    cache, (key, value) = MixKVQCache(), make()
    got = cache.update(key, value, 0)
    for a, b in zip(got, (key, value), strict=True):
        assert (a.shape, a.data_ptr(), a.requires_grad) == (b.shape, b.data_ptr(), b.requires_grad)
    keys, values = cache.update(key, value, 0)
    assert keys.shape[2] == values.shape[2] == 600 and keys.requires_grad == key.requires_grad
    if key.device.type == "cpu":
        assert torch.equal(keys, torch.cat([key, key], 2)) and torch.equal(values, torch.cat([value, value], 2))
    layer = cache.report().layers[0]
    assert layer.path == "native" and reason in layer.reason and layer.record_bytes == 0


@pytest.mark.parametrize("head_dim", [8, 24, 48, 80, 96, 128, 192, 256])
def test_every_multiple_of_eight_is_packed(head_dim):
    model = tiny("llama", head_dim=head_dim)
    cache = MixKVQCache()
    generate(model, prompts([160]), cache, 3)
    assert [layer.path for layer in cache.report().layers] == ["packed"] * 2
    assert sum(layer.dequantizations for layer in cache.layers) == 0


def test_a_model_with_an_unsupported_head_dim_works():
    model, inputs = tiny("llama", head_dim=20), prompts([160])
    cache = MixKVQCache()
    got = generate(model, inputs, cache, 5)
    assert torch.equal(got.sequences, generate(model, inputs, None, 5).sequences)
    assert all("head_dim is 20" in layer.reason for layer in cache.report().layers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_kept_exact_and_reported(bad):
    key, value = states(tokens=300), states(tokens=300)
    key[1, 0, 100, 3] = bad
    cache = MixKVQCache()
    cache.update(key, value, 0)
    cache.update(states(tokens=1), states(tokens=1), 0)
    with pytest.warns(UserWarning, match="decoded in every step"):
        keys, _ = cache.update(states(), states(), 0)
    report = cache.report()
    assert report.layers[0].exact_blocks == 1 and "exact blocks: 1" in str(report)
    assert torch.equal(keys[1, 0, 4:132].nan_to_num(5.0), key[1, 0, 4:132].nan_to_num(5.0))
    assert bool(keys[0].isfinite().all())


# ---- an empty cache ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [None, "llama"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda c: c.reorder_cache(torch.tensor([0, 0])),
        lambda c: c.batch_select_indices(torch.tensor([0])),
        lambda c: c.batch_repeat_interleave(3),
        lambda c: c.crop(-4),
        lambda c: c.crop(0),
        lambda c: c.reset(),
        lambda c: c.activate_past_recording(),
        lambda c: print(c.report(), c),
        lambda c: copy.deepcopy(c),
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: list(c),
    ],
)
def test_operations_on_an_empty_cache(operation, config):
    cache = MixKVQCache(config=config and tiny(config).config)
    operation(cache)
    report = cache.report()
    assert cache.get_seq_length() == 0
    assert report.nbytes == report.peak_nbytes == 0 and report.true_bits == report.effective_bits == 0
    assert len(report.layers) == len(cache) == (2 if config else 0)
    assert not cache.is_compileable
    if compat.VERSION >= (5, 4):  # before, an argument were the positions of the queries
        assert cache.get_mask_sizes(7, 0) == (7, 0)
    forward(tiny("llama"), cache, prompts([300])["input_ids"])
    assert cache.report().layers[0].path == "packed"


# ---- together with other arguments ---------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_cache_implementation_together_with_a_cache(implementation):
    """transformers' own message names both arguments and the way out."""
    cache = caches()["packed"]
    before = snapshot(cache)
    with pytest.raises(ValueError) as caught:
        generate(tiny("llama"), prompts([70, 60]), cache, 3, cache_implementation=implementation)
    for word in ("`cache_implementation`", "use only one of the two"):
        assert word in str(caught.value)
    assert_unchanged(cache, before)


def test_layers_are_not_offloaded():
    cache = caches()["packed"]
    with pytest.raises(NotImplementedError, match="offload=True keeps records"):
        cache.layers[0].offload()


def test_a_model_that_asks_for_another_kind_of_layer_is_told_the_fix():
    cache = lossless()
    forward(tiny("llama"), cache, prompts([20])["input_ids"])
    with pytest.raises(AttributeError, match=r"no 'store_compression_weights'.* MixKVQCache\(config=model\.config\)"):
        cache.layers[0].store_compression_weights("compressor")
