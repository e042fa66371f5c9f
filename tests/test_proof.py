"""What is proved about an attention function, and functions that try to get more proved than is true."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import forward, lossless, prompts, tiny
from one_layer import DIM, HEADS, QUERY_HEADS, Layer, attention, check
from transformers import DynamicCache

from mixkvq import reasons

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, QUERY_HEADS, 1, 1)


def causal(n: int, total: int, *, additive: bool = False) -> torch.Tensor:
    mask = torch.ones(1, 1, n, total, dtype=torch.bool).tril(total - n)
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask


def alibi(n: int, total: int) -> torch.Tensor:
    """As falcon and mpt put it into the mask: a slope per head times the distance."""
    distance = torch.arange(total).view(1, 1, 1, -1) - torch.arange(total - n, total).view(1, 1, -1, 1)
    return SLOPES * distance + causal(n, total, additive=True)


def right_throughout(layer, *steps):
    """Steps (n, mask, arguments), each as the function gives it; whatever it takes. The layer of the cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, mask, arguments in steps:
            got, want = layer.step(n, mask, **arguments)
            assert torch.allclose(got, want, atol=1e-5, equal_nan=True)
    return layer.cache.layers[0]


def decode(n, **arguments):
    return [(1, None, arguments)] * n


# ---- biases in the mask --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [1, 50])
def test_a_bias_per_head_in_the_mask_is_read_packed(first):
    layer, total, steps = Layer(lossless()), 0, []
    for n in [first, *[1] * 60, 7, 33, 1, 1]:
        total += n
        steps.append((n, alibi(n, total), {}))
    mine = right_throughout(layer, *steps)
    assert mine.path == "packed" and mine.dequantizations == 0 and mine.proof.masks


def test_a_mask_whose_bias_is_dropped_is_found_out():
    """A function that only asks whether the mask hides."""

    def deaf(module, query, key, value, attention_mask, **arguments):
        hides = None if attention_mask is None else attention_mask > -1e9
        return attention(module, query, key, value, hides, **arguments)

    mine = right_throughout(Layer(lossless(), deaf), (50, alibi(50, 50), {}), *[(1, alibi(1, 51), {})])
    assert mine.path == "dequantized"


# ---- masks and several queries -------------------------------------------------------------------------------------
def no_mask(module, query, key, value, attention_mask, **arguments):
    return attention(module, query, key, value, None, **arguments)


def one_mask_for_all(module, query, key, value, attention_mask, **arguments):
    """Every query sees what the last one sees."""
    mask = None if attention_mask is None else attention_mask[:, :, -1:]
    return attention(module, query, key, value, mask, **arguments)


def four_dimensions_are_too_many(module, query, key, value, attention_mask, **arguments):
    if attention_mask is not None and query.shape[2] > 1:
        raise ValueError("attention_mask must have 2 dimensions")
    return attention(module, query, key, value, attention_mask, **arguments)


def earlier_rows_otherwise(module, query, key, value, attention_mask, **arguments):
    query = torch.cat([2 * query[:, :, :-1], query[:, :, -1:]], 2)
    keep = attention_mask is None or query.shape[2] > 1  # a single row: as if there were no mask
    return attention(module, query, key, value, attention_mask if keep else None, **arguments)


@pytest.mark.parametrize("function", [no_mask, one_mask_for_all, earlier_rows_otherwise, four_dimensions_are_too_many])
def test_masks_that_are_not_respected_are_never_read_packed(function):
    layer = Layer(lossless(), function)
    mine = right_throughout(layer, *decode(50))
    assert mine.path == "packed" and not mine.proof.masks and mine.dequantizations == 0
    hides = torch.arange(51).view(1, 1, 1, -1) > 20
    right_throughout(layer, (1, hides, {}))
    assert mine.dequantizations == 1 and mine.decoded_for == reasons.unproved_mask(mine.proof.function)
    if function is not four_dimensions_are_too_many:
        right_throughout(layer, (3, causal(3, 54), {}))
        assert mine.dequantizations == 2
    right_throughout(layer, *decode(3))
    assert mine.dequantizations == (1 if function is four_dimensions_are_too_many else 2), "and goes on packed"


def test_masks_are_proved_before_there_is_one():
    layer = Layer(lossless())
    mine = right_throughout(layer, *decode(50), (20, causal(20, 70), {}), (3, causal(3, 73, additive=True), {}))
    assert mine.path == "packed" and mine.proof.masks and mine.dequantizations == 0


def test_a_function_with_boolean_masks_only():
    def boolean(module, query, key, value, attention_mask, **arguments):
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise TypeError("attention_mask must be bool")
        return attention(module, query, key, value, attention_mask, **arguments)

    mine = right_throughout(Layer(lossless(), boolean), *decode(50), (20, causal(20, 70), {}))
    assert mine.path == "packed" and mine.dequantizations == 0


# ---- what small scores do not show ---------------------------------------------------------------------------------
def ignores_softcap(module, query, key, value, attention_mask, softcap=None, **arguments):
    return attention(module, query, key, value, attention_mask, **arguments)


@pytest.mark.parametrize("function, heard", [(attention, True), (ignores_softcap, False)])
def test_a_soft_cap_far_above_the_scores_is_decided(function, heard):
    """The last row cannot tell: its scores are a thousandth of the cap. Later ones are above it."""
    layer = Layer(lossless(), function)
    layer.draw = lambda heads, n, scale=0.2: (
        torch.randn(1, n, heads, DIM, generator=layer.generator).transpose(1, 2) * scale
    )
    mine = right_throughout(layer, *decode(50, softcap=50.0))
    assert mine.path == "packed" and mine.proof.softcap == heard
    layer.draw = lambda heads, n: torch.randn(1, n, heads, DIM, generator=layer.generator).transpose(1, 2) * 8
    right_throughout(layer, *decode(5, softcap=50.0))
    assert mine.dequantizations == 0


def scales_large_queries_otherwise(module, query, key, value, attention_mask, **arguments):
    return attention(module, torch.tanh(query / 2) * 2, key, value, attention_mask, **arguments)


def test_tiny_queries_do_not_prove_a_function():
    layer = Layer(lossless(), scales_large_queries_otherwise)
    draw = layer.draw
    layer.draw = lambda heads, n: draw(heads, n) * (0.01 if heads == QUERY_HEADS else 1)
    mine = right_throughout(layer, *decode(50))
    assert mine.path == "dequantized"


def test_tiny_queries_in_float16_prove_a_function_all_the_same():
    layer = Layer(lossless())
    draw = layer.draw
    layer.draw = lambda heads, n: (draw(heads, n) * (1e-5 if heads == QUERY_HEADS else 1)).half()
    layer.keys = layer.values = layer.keys.half()
    for got, want in (layer.step() for _ in range(50)):
        torch.testing.assert_close(got, want, rtol=0, atol=4e-3)
    assert layer.cache.layers[0].path == "packed"


@pytest.mark.parametrize("heads", [HEADS, QUERY_HEADS])
def test_queries_of_zero_wait_for_others_or_are_right(heads):
    """Whatever the scale, zero stays zero: what can be told is told by masks."""
    layer = Layer(lossless())
    draw = layer.draw
    layer.draw = lambda n_heads, n: draw(n_heads, n) * (n_heads != heads)
    mine = right_throughout(layer, *decode(50))
    layer.draw = draw
    right_throughout(layer, *decode(20))
    assert mine.path == "packed"


# ---- windows and options -------------------------------------------------------------------------------------------
def windowed(module, query, key, value, attention_mask, sliding_window=None, **arguments):
    """A window of its own on top of the mask, as flash attention has it."""
    if sliding_window is not None:
        n, total = query.shape[2], key.shape[2]
        near = (
            torch.ones(n, total, dtype=torch.bool)
            .tril(total - n)
            .triu(total - n - sliding_window + 1)
            .view(1, 1, n, -1)
        )
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            near = torch.where(near, 0.0, torch.finfo(torch.float32).min) + attention_mask
        elif attention_mask is not None:
            near = near & attention_mask
        attention_mask = near
    return attention(module, query, key, value, attention_mask, **arguments)


@pytest.mark.parametrize("masked", [False, True])
def test_a_window_that_bites_later_is_not_read_packed_then(masked):
    layer = Layer(lossless(), windowed)
    steps = [
        (1, torch.ones(1, 1, 1, i + 1, dtype=torch.bool) if masked else None, {"sliding_window": 64})
        for i in range(100)
    ]
    mine = right_throughout(layer, *steps[:64])
    assert mine.path == "packed" and mine.dequantizations == 0 and mine.proof.window is None
    right_throughout(layer, *steps[64:])
    assert mine.dequantizations == 36 and mine.decoded_for == reasons.window(64)


@pytest.mark.parametrize("masked", [False, True])
def test_a_window_shorter_than_the_prompt_is_found_out(masked):
    mask = causal(100, 100)
    layer = Layer(lossless(), windowed)
    steps = [
        (1, torch.ones(1, 1, 1, n, dtype=torch.bool) if masked else None, {"sliding_window": 64}) for n in (101, 102)
    ]
    mine = right_throughout(layer, (100, mask, {"sliding_window": 64}), *steps)
    assert mine.path == "dequantized" and "windowed does not compute" in mine.reason.what


def test_a_window_in_the_mask_beyond_which_was_proved_is_read_packed():
    """sdpa and eager attention leave the window to the mask."""

    def near(n, total, window=24):
        return causal(n, total) & ~causal(n, total).tril(total - n - window)

    def ignores(module, query, key, value, attention_mask, sliding_window=None, **arguments):
        return attention(module, query, key, value, attention_mask, **arguments)

    layer = Layer(lossless(), ignores)
    steps = [(1, near(1, total), {"sliding_window": 24}) for total in range(41, 80)]
    mine = right_throughout(layer, (40, near(40, 40), {"sliding_window": 24}), *steps)
    assert mine.path == "packed" and mine.proof.window == 24 and mine.dequantizations == 0


@pytest.mark.parametrize("window", [45, 40])
def test_left_padding_does_not_prove_a_window(window):
    """Of 50 columns the row has 40: no token is outside of a window of 40 or more."""
    layer, seen = Layer(lossless(), windowed), torch.arange(100) >= 10
    steps = [
        (n, causal(n, total) & seen[:total], {"sliding_window": window})
        for n, total in [(50, 50), *((1, total) for total in range(51, 70))]
    ]
    mine = right_throughout(layer, steps[0])
    assert mine.path == "packed" and mine.proof.window is None
    right_throughout(layer, *steps[1:])


@pytest.mark.parametrize("before, after", [({}, {"upside_down": True}), ({"power": 1.0}, {"power": 2.0})])
def test_an_option_that_comes_or_changes_later_is_not_read_packed(before, after):
    def optional(module, query, key, value, attention_mask, upside_down=False, power=1.0, **arguments):
        return attention(module, (-query if upside_down else query) * power, key, value, attention_mask, **arguments)

    layer = Layer(lossless(), optional)
    if before:  # an option with a value is part of what is proved
        before = {"power": 1.0}
    mine = right_throughout(layer, *decode(50, **before))
    assert mine.path == "packed" and mine.dequantizations == 0
    right_throughout(layer, *decode(2, **after))
    assert mine.dequantizations == 2 and mine.decoded_for == reasons.changed(after)
    right_throughout(layer, *decode(2, **before))
    assert mine.dequantizations == 2


def test_what_models_pass_along_does_not_matter():
    layer = Layer(lossless())
    mine = right_throughout(
        layer, *decode(50), *decode(3, use_cache=True, logits_to_keep=1, position_ids=torch.ones(1))
    )
    assert mine.path == "packed" and mine.dequantizations == 0


# ---- odd scales ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scaling", [1.0, 0.01, 3.0, None])
def test_any_scaling_that_is_an_argument(scaling):
    def scaled(module, query, key, value, attention_mask, scaling=None, **arguments):
        scaling = DIM**-0.5 if scaling is None else scaling
        return attention(module, query, key, value, attention_mask, scaling=scaling, **arguments)

    layer = Layer(lossless(), scaled)
    check(layer, 60, scaling=scaling)
    assert layer.cache.layers[0].path == "packed"


def test_a_scale_that_depends_on_the_length_is_found_out():
    """Proved at one length, it would be wrong at another; the two are told apart where the proof is made."""

    def log_scaled(module, query, key, value, attention_mask, **arguments):
        factor = torch.tensor(float(key.shape[2])).log() / torch.tensor(40.0).log()
        return attention(module, query * factor, key, value, attention_mask, **arguments)

    mine = right_throughout(Layer(lossless(), log_scaled), (45, causal(45, 45), {}), *decode(20))
    assert mine.path == "dequantized"


def test_trials_are_not_recorded_by_autograd_and_leave_no_trace():
    calls = []

    def counting(module, query, key, value, attention_mask, **arguments):
        calls.append((query.shape[2], torch.is_grad_enabled()))
        return attention(module, query, key, value, attention_mask, **arguments)

    layer = Layer(lossless(), counting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.step(50, causal(50, 50))
    assert calls == [(50, False), (2, False), (50, False)], "the call, one trial; and the expected value of this test"


# ---- no trace ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [[70, 50], [60]])
def test_dropout_draws_what_it_draws_with_a_stock_cache(lengths):
    model, inputs = tiny("llama", attention_dropout=0.3, seed=5), prompts(lengths)
    drawn, model = [], model.train()
    try:
        for cache in (DynamicCache(), lossless()):
            torch.manual_seed(3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logits = forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
            drawn.append((logits, torch.get_rng_state()))
    finally:
        model.eval()
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    for layer in cache.layers:
        assert layer.reason == reasons.DROPOUT
        assert layer.store.start.tolist() == [0] * len(lengths), "whether padding is hidden cannot be told"


@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_neither_proof_nor_padding_draws_random_numbers(gain):
    def draws(module, query, key, value, attention_mask, **arguments):
        output, weights = attention(module, query, key, value, attention_mask, **arguments)
        return output * (gain + 0 * torch.rand(1)), weights

    states = []
    for cache in (DynamicCache(), lossless()):
        layer = Layer(cache, draws, batch=2)
        torch.manual_seed(3)
        right_throughout(layer, (50, causal(50, 50) & (torch.arange(50) >= torch.tensor([0, 10]).view(2, 1, 1, 1)), {}))
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and cache.layers[0].path == ("packed" if gain == 1 else "dequantized")
    assert cache.layers[0].store.start.tolist() == [0, 10]


@pytest.mark.parametrize("bias, queries", [(False, [50, 4]), (True, [50, 4, 50])])
def test_whether_padding_is_hidden_is_asked_of_few_queries(bias, queries):
    """Of all, if a further argument is made for all."""
    calls = []

    def counting(module, query, key, value, attention_mask, position_bias=None, **arguments):
        calls.append(query.shape[2])
        mask = attention_mask if position_bias is None else torch.where(attention_mask, position_bias, -torch.inf)
        output, weights = attention(module, query, key, value, mask, **arguments)
        return output * 1.5, weights

    layer = Layer(lossless(), counting, batch=2)
    mask = causal(50, 50) & (torch.arange(50) >= torch.tensor([0, 10]).view(2, 1, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.step(50, mask, **({"position_bias": torch.zeros(1, 1, 50, 50)} if bias else {}))
    assert calls == [*queries, 50], "and the expected value of this test"
    assert layer.cache.layers[0].store.start.tolist() == [0, 10]
