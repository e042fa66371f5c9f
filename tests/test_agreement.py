"""The short path of decoding: taken when a call is like the one before, and only then."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import lossless
from one_layer import HEADS, QUERY_HEADS, Layer, check, packed_layer

from mixkvq import MixKVQCache, hook
from mixkvq.queries import QueryStatistics

SINKS = torch.linspace(-1, 3, QUERY_HEADS)
quiet = pytest.mark.filterwarnings("error")


@pytest.fixture
def checked_in_full(monkeypatch):
    """Calls on a packed layer that were checked in full, as they come."""
    calls = []
    original = hook._packed_call
    monkeypatch.setattr(hook, "_packed_call", lambda call: calls.append(call) or original(call))
    return calls


@quiet
def test_a_call_like_the_one_before_is_not_checked_again(checked_in_full):
    layer = Layer(lossless())
    check(layer, 32 + 100, position_ids=torch.zeros(1))
    assert len(checked_in_full) == 1 and layer.cache.layers[0].store.blocks.tolist() == [4]


@quiet
def test_queries_of_short_calls_are_seen_too(checked_in_full):
    layer = Layer(MixKVQCache(block_length=32, residual_length=32, key_group_size=32))
    for _ in range(132):
        layer.step()
    again, want = Layer(None), QueryStatistics("rms")
    for _ in range(132):
        want.add(again.draw(QUERY_HEADS, 1), HEADS, None)
        again.draw(HEADS, 1), again.draw(HEADS, 1)
    got = layer.cache.layers[0].queries
    assert torch.equal(got.sum, want.sum) and got.count.tolist() == [132 * QUERY_HEADS // HEADS]
    assert len(checked_in_full) == 1


@pytest.mark.parametrize(
    "difference",
    [
        {"scaling": 0.5},
        {"scaling": 1},
        {"softcap": None},
        {"mask": torch.ones(1, 1, 1, 61, dtype=torch.bool)},
        {"s_aux": None},
    ],
)
def test_a_call_that_differs_is_checked_in_full(checked_in_full, difference):
    layer = packed_layer()
    checked_in_full.clear()
    got, want = layer.step(**difference)
    assert torch.allclose(got, want, atol=1e-5) and len(checked_in_full) == 1


def seen(total, *, batch=1, additive=False, hidden=0):
    """A mask for one query, which hides the first columns of the last row."""
    mask = torch.ones(batch, 1, 1, total, dtype=torch.bool)
    mask[-1, ..., :hidden] = False
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask


@quiet
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"softcap": 2.0}, {"s_aux": SINKS}, {"s_aux": None}])
def test_a_mask_like_the_one_before_is_not_checked_again(checked_in_full, additive, arguments):
    layer = Layer(lossless())
    for total in range(1, 32 + 100):
        got, want = layer.step(1, seen(total, additive=additive), **arguments)
        assert torch.allclose(got, want, atol=1e-5)
    assert len(checked_in_full) == 1 and layer.cache.layers[0].store.blocks.tolist() == [4]


def padded(layer, steps):
    """Steps of two rows, the second padded with ten columns."""
    for _ in range(steps):
        got, want = layer.step(1, seen(layer.keys.shape[2] + 1, batch=2, hidden=10))
        assert torch.allclose(got, want, atol=1e-5)


@quiet
def test_a_padded_batch_is_not_checked_again(checked_in_full):
    layer = Layer(lossless(), batch=2)
    layer.step(50, torch.ones(2, 1, 50, 50, dtype=torch.bool).tril() & seen(50, batch=2, hidden=10))
    padded(layer, 70)
    mine = layer.cache.layers[0]
    assert mine.store.starts == (0, 10) and len(checked_in_full) == 1 and mine.store.blocks.tolist() == [3, 3]


def test_a_mask_that_shows_padding_is_checked_in_full(checked_in_full):
    """In the step after one that hid it, and by a mask that another layer has found right."""
    layer, other = Layer(lossless(), batch=2), Layer(lossless(), batch=2)
    for each, hidden in ((layer, 10), (other, 9)):
        each.step(50, torch.ones(2, 1, 50, 50, dtype=torch.bool).tril() & seen(50, batch=2, hidden=hidden))
        each.step(1, seen(51, batch=2, hidden=10))
    checked_in_full.clear()
    mask = seen(52, batch=2, hidden=9)
    other.step(1, mask)
    assert not checked_in_full
    with pytest.warns(UserWarning, match="shows columns"):
        layer.step(1, mask)
    with pytest.warns(UserWarning, match="shows columns"):
        other.step(1)
    assert len(checked_in_full) == 2


@pytest.mark.parametrize(
    "mask",
    [
        None,
        seen(61, additive=True),
        seen(61).expand(1, QUERY_HEADS, 1, 61),
        seen(61, additive=True).bfloat16(),
        seen(61)[0],
    ],
)
def test_a_mask_of_another_kind_is_checked_in_full(checked_in_full, mask):
    layer = Layer(lossless())
    for total in range(1, 61):
        layer.step(1, seen(total))
    checked_in_full.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, want = layer.step(1, mask)
    assert torch.allclose(got, want, atol=1e-5) and len(checked_in_full) == 1


def test_a_mask_that_is_too_narrow_is_checked_in_full(checked_in_full):
    layer = packed_layer()
    layer.step(1, seen(61))
    checked_in_full.clear()
    with pytest.raises(RuntimeError, match="size of tensor"):
        layer.step(1, seen(61))
    assert len(checked_in_full) == 1


@quiet
def test_learned_sinks_are_read_in_every_call(checked_in_full):
    sinks = SINKS.clone()
    layer = packed_layer(s_aux=sinks)
    sinks += 1
    check(layer, 3, s_aux=sinks)
    check(layer, 3, s_aux=(sinks - 1).bfloat16())
    assert len(checked_in_full) == 1


def test_a_batch_that_was_reordered_is_checked_in_full(checked_in_full):
    layer = Layer(lossless(), batch=2)
    check(layer, 60)
    checked_in_full.clear()
    layer.cache.batch_select_indices(torch.tensor([1]))
    layer.keys, layer.values, layer.batch = layer.keys[1:], layer.values[1:], 1
    check(layer, 3)
    assert len(checked_in_full) == 1


def test_wrong_tokens_are_refused_on_a_packed_layer_too():
    layer = packed_layer()
    key, length = layer.draw(HEADS, 1), layer.cache.get_seq_length()
    for wrong, error in ((None, TypeError), (key[..., :8], ValueError)):
        with pytest.raises(error, match="value_states"):
            layer.cache.update(key, wrong, 0)
    with pytest.raises(ValueError, match="on meta, must be"):
        layer.cache.update(key.to("meta"), key.to("meta"), 0)
    assert layer.cache.get_seq_length() == length
    check(layer, 1)
