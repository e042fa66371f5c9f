"""One attention layer on a cache, without a model around it."""

from __future__ import annotations

import torch
from models import lossless
from transformers import AttentionInterface

from mixkvq import compat

HEADS, QUERY_HEADS, DIM = 2, 4, 16


class Module(torch.nn.Module):
    """What an attention function asks of its module."""

    num_key_value_groups = QUERY_HEADS // HEADS
    is_causal = True
    config = None


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """Eager attention with everything the kernel knows."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = (
            scores.masked_fill(~attention_mask, -torch.inf)
            if attention_mask.dtype == torch.bool
            else scores + attention_mask
        )
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


def found(function):
    """The attention function as a module finds it, with the hook if it is in place."""
    if compat.SEES_EAGER:
        return compat.attention_function("eager", function)
    AttentionInterface.register("one_layer", function)
    return compat.attention_function("one_layer", function)


class Layer:
    """One attention layer without a model around it."""

    def __init__(self, cache, function=attention, batch=1, seed=0):
        self.cache, self.function, self.batch = cache, function, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = self.values = torch.zeros(batch, HEADS, 0, DIM)

    def draw(self, heads, n):
        return torch.randn(self.batch, n, heads, DIM, generator=self.generator).transpose(1, 2)

    def step(self, n=1, mask=None, **arguments):
        """(what the hooked call gives, what the function gives on all exact keys)."""
        query, key, value = self.draw(QUERY_HEADS, n), self.draw(HEADS, n), self.draw(HEADS, n)
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        arguments = {"scaling": DIM**-0.5, "dropout": 0.0, **arguments}
        given = self.cache.update(key, value, 0)
        with torch.no_grad():
            got = found(self.function)(Module(), query, *given, mask, **arguments)
            want = self.function(Module(), query, self.keys, self.values, mask, **arguments)
        return got[0], want[0]


def check(layer, steps=40, **arguments):
    for _ in range(steps):
        got, want = layer.step(**arguments)
        assert torch.allclose(got, want, atol=1e-5)


def packed_layer(**arguments):
    layer = Layer(lossless())
    check(layer, 60, **arguments)
    assert layer.cache.layers[0].path == "packed"
    return layer
