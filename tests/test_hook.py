"""The attention hook: what it recognises, what it proves, when it steps aside."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from models import dense_copy, forward, generate, lossless, paths, prompts, relative_gap, tiny
from one_layer import DIM, HEADS, QUERY_HEADS, Layer, Module, attention, check, found, packed_layer
from transformers import DynamicCache
from versions import needs_eager

import mixkvq
from mixkvq import MixKVQCache, compat, hook


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- the proof -----------------------------------------------------------------------------------------------------
SINKS = torch.linspace(-1, 3, QUERY_HEADS)


@pytest.mark.parametrize(
    "arguments, variant",
    [
        ({}, (False, False)),
        ({"softcap": 2.0}, (True, False)),
        ({"s_aux": SINKS}, (False, True)),
        ({"softcap": 2.0, "s_aux": SINKS}, (True, True)),
    ],
)
def test_what_the_function_computes_is_found_out(quiet, arguments, variant):
    layer = Layer(lossless())
    check(layer, 100, **arguments)
    mine = layer.cache.layers[0]
    assert mine.path == "packed" and (mine.proof.softcap, mine.proof.sinks) == variant
    assert mine.store.blocks.tolist() == [3] and mine.dequantizations == 0


def test_an_ignored_argument_is_found_out(quiet):
    """As sdpa of transformers 5.17 does with gemma's softcap."""

    def deaf(module, query, key, value, attention_mask, softcap=None, s_aux=None, **arguments):
        return attention(module, query, key, value, attention_mask, **arguments)

    layer = Layer(lossless(), deaf)
    check(layer, 80, softcap=2.0, s_aux=SINKS)
    assert layer.cache.layers[0].path == "packed" and not layer.cache.layers[0].proof.softcap


def twice_the_scale(*args, scaling=None, **kwargs):
    return attention(*args, scaling=2 * scaling, **kwargs)


def twice_the_scale_of_all(module, query, key, value, attention_mask, **arguments):
    return twice_the_scale(module, query, key, value, None, **arguments)


@pytest.mark.parametrize("function, starts", [(twice_the_scale, [0, 10]), (twice_the_scale_of_all, [0, 0])])
def test_padding_that_a_function_does_not_hide_is_stored(function, starts):
    layer = Layer(lossless(), function, batch=2)
    with pytest.warns(UserWarning, match="decoded in every step"):
        for step, n in enumerate([30] + [1] * 40):
            mask = torch.ones(2, 1, n, 30 + step, dtype=torch.bool).tril(30 + step - n)
            mask[1, ..., :10] = False
            got, want = layer.step(n, mask)
            real = (slice(None), slice(10, None)) if n > 1 else ()
            assert torch.allclose(got[real], want[real], atol=1e-5)
    mine = layer.cache.layers[0]
    assert mine.path == "dequantized" and mine.store.start.tolist() == starts


def no_mask(module, query, key, value, attention_mask, **kwargs):
    return attention(module, query, key, value, None, **kwargs)


def a_bias(module, query, key, value, attention_mask, **kwargs):
    return attention(module, query, key, value, torch.linspace(0, 1, key.shape[2]), **kwargs)


def other_layout(*args, **kwargs):
    return attention(*args, **kwargs)[0].transpose(1, 2), None


@pytest.mark.parametrize("function", [twice_the_scale, no_mask, a_bias])
def test_other_attention_is_not_packed_but_right(function):
    layer = Layer(lossless(), function)
    masked = function is no_mask
    with pytest.warns(UserWarning, match="decoded in every step"):
        for n in range(1, 100):
            mask = (torch.arange(n) % 2 == 0).view(1, 1, 1, n) if masked else None
            got, want = layer.step(mask=mask)
            assert torch.allclose(got, want, atol=1e-5)
    mine = layer.cache.layers[0]
    assert mine.path == "dequantized" and function.__name__ in mine.reason.what and mine.store.blocks.tolist() == [3]


def test_another_layout_is_not_packed():
    layer = Layer(lossless(), other_layout)
    with pytest.warns(UserWarning, match="layout"):
        for _ in range(50):
            got, want = layer.step()
            assert torch.allclose(got, want, atol=1e-5)
    assert layer.cache.layers[0].path == "dequantized"


def test_an_unknown_tensor_argument_is_not_packed():
    layer = Layer(lossless())
    with pytest.warns(UserWarning, match="position_bias"):
        check(layer, 50, position_bias=torch.zeros(1))
    assert layer.cache.layers[0].path == "dequantized"


def test_nothing_is_proved_on_fully_masked_rows(quiet):
    """A row whose last query sees nothing tells nothing; with such rows only, the layer waits."""
    layer = Layer(lossless(), batch=1)
    mask = torch.ones(1, 1, 50, 50, dtype=torch.bool).tril()
    mask[:, :, -1] = False
    layer.step(50, mask)
    assert layer.cache.layers[0].mode == "plain"
    layer.step(1, torch.ones(1, 1, 1, 51, dtype=torch.bool))
    assert layer.cache.layers[0].mode == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=needs_eager)])
def test_sixteen_bit_models_are_packed(quiet, dtype, implementation):
    """Large scores: eager attention in 16 bits is far from exact there, the tolerance must follow."""
    model = tiny("qwen2", implementation, dtype, initializer_range=0.6)
    cache = lossless()
    generate(model, prompts([100, 60]), cache, 8)
    assert paths(cache) == ["packed", "packed"]
    assert all(layer.dequantizations == 0 for layer in cache.layers)


def test_a_twice_too_large_scale_is_found_out_in_sixteen_bits():
    layer = Layer(lossless(), twice_the_scale)
    layer.draw = lambda heads, n: torch.randn(1, heads, n, DIM, generator=layer.generator).bfloat16()
    layer.keys = layer.values = torch.zeros(1, HEADS, 0, DIM).bfloat16()
    with pytest.warns(UserWarning, match="twice_the_scale"):
        layer.step(64, torch.ones(1, 1, 64, 64, dtype=torch.bool).tril())


# ---- calls on a packed layer ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 31, 200])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_queries_of_any_length_with_a_mask_are_packed(quiet, n, dtype):
    layer = packed_layer()
    mask = torch.ones(1, 1, n, 60 + n, dtype=torch.bool).tril(60)
    if dtype == torch.float32:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
    got, want = layer.step(n, mask)
    assert torch.allclose(got, want, atol=1e-5)
    assert layer.cache.layers[0].dequantizations == 0


@pytest.mark.parametrize(
    "n, arguments, reason",
    [
        (2, {}, "2 queries without a mask"),
        (1, {"dropout": 1e-9}, "dropout"),
        (1, {"output_attentions": True}, "weights"),
        (1, {"softcap": 50.0}, "softcap given"),
        (1, {"position_bias": torch.zeros(1)}, "position_bias"),
        (1, {"sliding_window": 30}, "sliding_window"),
    ],
)
def test_a_call_that_the_kernel_cannot_serve_is_decoded_with_one_warning(n, arguments, reason):
    layer = packed_layer()
    with pytest.warns(UserWarning, match=reason) as caught:
        for times in (1, 2):
            got, want = layer.step(n, **arguments)
            assert torch.allclose(got, want, atol=1e-5)
            assert layer.cache.layers[0].dequantizations == times
    assert len(caught) == 1
    check(layer, 5)
    assert layer.cache.layers[0].dequantizations == 2, "and goes on packed"


def test_another_function_than_the_proved_one_is_not_replaced():
    layer = packed_layer()
    layer.function = twice_the_scale
    with pytest.warns(UserWarning, match="not proved"):
        check(layer, 3)


def test_queries_with_gradients_get_decoded_keys():
    layer = packed_layer()
    key, value = layer.draw(HEADS, 1), layer.draw(HEADS, 1)
    query = layer.draw(QUERY_HEADS, 1).requires_grad_()
    given = layer.cache.update(key, value, 0)
    with pytest.warns(UserWarning, match="gradients"):
        output = found(attention)(Module(), query, *given, None, scaling=0.25)[0]
    output.sum().backward()
    assert query.grad.isfinite().all()


# ---- installing ----------------------------------------------------------------------------------------------------
def looked_up():
    """The method that the hook replaces."""
    return getattr(*compat.attention_lookup())


def test_installing_twice_and_taking_out():
    MixKVQCache()
    hooked = looked_up()
    mixkvq.install()
    assert looked_up() is hooked
    try:
        mixkvq.uninstall()
        assert looked_up() is not hooked
        mixkvq.uninstall()
        assert found(attention) is attention
    finally:
        mixkvq.install()
    assert found(attention).__wrapped__ is attention


def test_without_the_hook_everything_is_decoded_and_right():
    model, inputs = tiny("llama"), prompts([70, 50])
    want = generate(model, inputs, DynamicCache(), 20)
    for late in (False, True):
        cache = lossless()
        if late:
            half = generate(model, inputs, cache, 3)
            assert paths(cache) == ["packed", "packed"]
            grown = {
                "input_ids": half.sequences,
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1),
            }
        try:
            mixkvq.uninstall()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = generate(model, grown if late else inputs, cache, 17 if late else 20)
        finally:
            mixkvq.install()
        assert torch.equal(got.sequences, want.sequences)
        assert all(layer.dequantizations > 0 for layer in cache.layers)


@pytest.mark.parametrize("value", ["OFF", "0", "false"])
def test_the_environment_must_say_on_or_off(monkeypatch, value):
    monkeypatch.setenv("MIXKVQ_HOOK", value)
    with pytest.raises(ValueError, match=f"MIXKVQ_HOOK is '{value}', must be 'on' or 'off'"):
        MixKVQCache()
    for allowed in ("", "on"):
        monkeypatch.setenv("MIXKVQ_HOOK", allowed)
        MixKVQCache()


def test_the_environment_can_forbid_the_hook(monkeypatch):
    try:
        mixkvq.uninstall()
        before = looked_up()
        monkeypatch.setenv("MIXKVQ_HOOK", "off")
        MixKVQCache()
        assert looked_up() is before
    finally:
        monkeypatch.delenv("MIXKVQ_HOOK")
        mixkvq.install()
    assert looked_up() is not before


def test_models_with_another_cache_are_not_touched():
    model, inputs = tiny("llama"), prompts([60])
    MixKVQCache()
    hooked = generate(model, inputs, DynamicCache(), 10)
    try:
        mixkvq.uninstall()
        plain = generate(model, inputs, DynamicCache(), 10)
    finally:
        mixkvq.install()
    assert all(torch.equal(a, b) for a, b in zip(hooked.logits, plain.logits, strict=True))


def test_below_the_window_logits_are_bit_identical():
    model, inputs = tiny("qwen3"), prompts([20, 9])
    want, got = (generate(model, inputs, cache, 12) for cache in (DynamicCache(), MixKVQCache()))
    assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))


def test_a_copied_layer_does_not_talk_to_the_old_cache():
    model = tiny("llama")
    ids = prompts([40])["input_ids"]
    cache = lossless()
    forward(model, cache, ids[:, :20])
    other = copy.deepcopy(cache)
    forward(model, other, ids[:, 20:])
    assert cache.get_seq_length() == 20 and paths(cache) == ["native", "native"]
    assert other.get_seq_length() == 40 and paths(other) == ["packed", "packed"]
    dense, step = dense_copy(other), ids[:, :1]
    assert relative_gap(forward(model, other, step), forward(model, dense, step)) < 1e-5


def test_tags_do_not_reach_the_state():
    model = tiny("llama")
    cache = MixKVQCache()
    forward(model, cache, prompts([20])["input_ids"])
    forward(model, cache, prompts([1])["input_ids"])
    assert not any(hasattr(t, hook.TAG) for layer in cache.layers for t in layer.tensors())


# ---- functions that share a name -----------------------------------------------------------------------------------
def times(gain):
    def amplified(*args, **kwargs):
        output, weights = attention(*args, **kwargs)
        return output * gain, weights

    return amplified


class Amplifier:
    __slots__ = ("gain",)  # no weak references

    def __init__(self, gain):
        self.gain = gain

    def __call__(self, *args, **kwargs):
        return times(self.gain)(*args, **kwargs)


class Owner:
    def __init__(self, gain):
        self.gain = gain

    def attention(self, *args, **kwargs):
        return times(self.gain)(*args, **kwargs)


MAKERS = {
    "closure": times,
    "partial": lambda gain: functools.partial(lambda *args, gain, **kwargs: times(gain)(*args, **kwargs), gain=gain),
    "object": Amplifier,
    "method": lambda gain: Owner(gain).attention,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_functions_are_told_apart_by_object_not_by_name(make):
    layer = Layer(lossless(), make(1.0))
    check(layer, 60)
    mine, first = layer.cache.layers[0], layer.function
    assert mine.path == "packed" and mine.dequantizations == 0
    layer.function = make(0.1)
    with pytest.warns(UserWarning, match="not proved"):
        check(layer, 3)
    assert mine.dequantizations == 3
    layer.function = first
    check(layer, 3)
    assert mine.dequantizations == 3, "the proved function again"


def test_a_method_that_is_bound_anew_for_every_call_is_one_function(quiet):
    owner = Owner(1.0)
    layer = Layer(lossless())
    for _ in range(60):
        layer.function = owner.attention
        check(layer, 1)
    assert layer.cache.layers[0].path == "packed" and layer.cache.layers[0].dequantizations == 0


def test_a_function_that_is_wrapped_anew_for_every_call_is_one_function(quiet):
    """As another library's hook may do it, around whatever it finds."""

    def around(function):
        return lambda *args, gain=1.0, **kwargs: function(*args, **kwargs)

    layer = Layer(lossless())
    for _ in range(60):
        layer.function = around(around(functools.partial(attention)))
        check(layer, 1)
    assert layer.cache.layers[0].path == "packed" and layer.cache.layers[0].dequantizations == 0


def test_another_function_that_computes_the_same_is_read_packed_from_its_second_call_on():
    layer = packed_layer()
    layer.function = times(1.0)
    with pytest.warns(UserWarning, match="not proved"):
        check(layer, 40)
    mine = layer.cache.layers[0]
    assert mine.dequantizations == 1 and mine.path == "packed" and "amplified" in mine.reason.what
    assert mine.store.blocks.tolist() == [3]


def unpickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize(
    "way, function, decoded",
    [
        (copy.deepcopy, attention, 0),
        (unpickled, attention, 0),
        (copy.deepcopy, times(1.0), 0),
        (unpickled, times(1.0), 1),
    ],
    ids=["copy", "pickle", "copy-closure", "pickle-closure"],
)
def test_a_proof_survives_copies_but_trusts_no_name_after_unpickling(way, function, decoded):
    """A function that can be imported is found again, what another one closes over is not known any more."""
    layer = Layer(lossless(), function)
    check(layer, 60)
    layer.cache = way(layer.cache)
    mine = layer.cache.layers[0]
    before = mine.dequantizations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(layer, 5)
    assert mine.path == "packed" and mine.dequantizations == before + decoded


def test_functions_are_not_kept_alive():
    class Large:
        pass

    def make():
        large = Large()
        gone.append(weakref.ref(large))
        return lambda *args, kept=large, **kwargs: attention(*args, **kwargs)

    gone: list = []
    layer = Layer(lossless(), make())
    check(layer, 60)
    assert layer.cache.layers[0].path == "packed"
    layer.function = attention
    gc.collect()
    assert gone[0]() is None
    with pytest.warns(UserWarning, match="not proved"):
        check(layer, 3)


def test_a_function_with_the_hook_gets_no_second_one():
    once = found(attention)
    assert found(once) is once and once.__wrapped__ is attention and hook.unwrapped(once) is attention
