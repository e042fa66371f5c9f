"""Handles: what stands in for the keys and values of a packed layer."""

from __future__ import annotations

import pytest
import torch
from models import generate, lossless, paths, prompts, tiny
from one_layer import HEADS, QUERY_HEADS, Module, attention, found, packed_layer


def test_a_handle_computes_as_what_it_stands_for():
    layer = packed_layer()
    key = layer.draw(HEADS, 1)
    keys, values = layer.cache.update(key, key, 0)
    want = torch.cat([layer.keys, key], 2)
    assert keys.shape == values.shape == want.shape and keys.dtype == want.dtype
    assert torch.equal(keys.transpose(2, 3) @ want, want.transpose(2, 3) @ want)
    assert torch.equal(torch.cat([values, want], 0)[0], torch.cat([layer.values, key], 2)[0])
    assert torch.equal(keys[:, 0, 3:5], want[:, 0, 3:5]) and torch.equal(keys.clone(), want)
    assert "PackedHandle" in repr(keys)
    assert layer.cache.report().layers[0].dequantizations == 4


def test_a_handle_cannot_be_written_and_goes_stale():
    layer = packed_layer()
    keys, _ = layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)
    for write in (lambda: keys.zero_(), lambda: keys.copy_(torch.zeros(())), lambda: torch.add(keys, 1, out=keys)):
        with pytest.raises(RuntimeError, match="read-only"):
            write()
    for change in (
        lambda: layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0),
        lambda: layer.cache.reorder_cache(torch.tensor([0])),
        lambda: layer.cache.crop(-1),
        lambda: layer.cache.reset(),
    ):
        change()
        with pytest.raises(RuntimeError, match="stale"):
            keys + 1
        if layer.cache.layers:
            keys, _ = layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)


def test_a_stale_handle_is_refused_by_the_kernel_too():
    layer = packed_layer()
    given = layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)
    layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)
    with pytest.raises(RuntimeError, match="stale"):
        found(attention)(Module(), layer.draw(QUERY_HEADS, 1), *given, None, scaling=1.0)


# ---- handles that are given out again ------------------------------------------------------------------------------
def two_packed_layers():
    cache = lossless()
    generate(tiny("llama"), prompts([60]), cache, 4)
    assert paths(cache) == ["packed", "packed"]
    return cache, torch.ones(1, 2, 1, 16)


def test_a_handle_that_nobody_has_is_given_out_again():
    cache, token = two_packed_layers()
    seen = [[id(t) for t in cache.update(token, token, index)] for index in (0, 1)]
    assert seen[0] == seen[1]


def test_a_handle_that_somebody_has_is_not_given_out_again():
    cache, token = two_packed_layers()
    first, second = (cache.update((index + 2) * token, token, index) for index in (0, 1))
    assert first[0] is not second[0] and first[1] is not second[1]
    assert first[0][0, 0, -1, 0] == 2 and second[0][0, 0, -1, 0] == 3
    one, _ = cache.update(4 * token, token, 0)  # the other one of the pair is free
    other, _ = cache.update(5 * token, token, 1)
    assert one[0, 0, -1, 0] == 4 and other[0, 0, -1, 0] == 5


def test_a_handle_that_autograd_keeps_is_not_given_out_again():
    cache, token = two_packed_layers()
    query = torch.ones(1, 2, 16, 1, requires_grad=True)
    product = cache.update(2 * token, token, 0)[0] @ query
    cache.update(token, token, 1)
    want = cache.layers[0].keys.sum(2).unsqueeze(-1)
    product.sum().backward()
    assert torch.allclose(query.grad, want)
