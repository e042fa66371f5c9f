"""`lossless` against `DynamicCache`: the same tokens, through real packed storage.

The default run generates 200 tokens with Llama for every prompt length and block length, greedy and with 4 beams, and
40 tokens with Qwen2 and Qwen3 (sdpa and eager); ``-m slow`` runs all combinations with 200 tokens.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from models import assert_same_tokens, generate, lossless, paths, prompts, tiny
from transformers import DynamicCache
from versions import kernel_path

LENGTHS = [1, 100, 128, 129, 1000]
BLOCKS = [32, 128]


def rows(length: int) -> list[int]:
    """Three prompts, two of them padded on the left (if longer than one token)."""
    return [length, -(-length // 2), max(length - 97, 1)]


@lru_cache(maxsize=64)
def expected(family: str, attention: str, length: int, beams: int, new_tokens: int):
    model = tiny(family, attention)
    return generate(model, prompts(rows(length)), DynamicCache(), new_tokens, num_beams=beams)


def compare(family: str, attention: str, length: int, block: int, beams: int, new_tokens: int) -> None:
    model, cache = tiny(family, attention), lossless(block)
    got = generate(model, prompts(rows(length)), cache, new_tokens, num_beams=beams)
    assert_same_tokens(expected(family, attention, length, beams, new_tokens), got)
    if beams == 1 and torch.equal(expected(family, attention, length, beams, new_tokens).sequences, got.sequences):
        for a, b in zip(expected(family, attention, length, beams, new_tokens).logits, got.logits, strict=True):
            assert float((a - b).abs().max() / (a.max() - a.min())) < 1e-5
    if length + new_tokens > block + 1:
        assert paths(cache) == [kernel_path(attention)] * 2
        assert all(layer.store.blocks.min() >= 0 and layer.store.blocks.max() >= 1 for layer in cache.layers)
        assert all((layer.dequantizations == 0) == (kernel_path(attention) == "packed") for layer in cache.layers)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("beams", [1, 4])
def test_llama(length, block, beams):
    compare("llama", "sdpa", length, block, beams, 200)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "length, block, beams", [(1, 32, 1), (100, 32, 4), (128, 128, 1), (129, 128, 4), (1000, 32, 1)]
)
def test_qwen(family, attention, length, block, beams):
    compare(family, attention, length, block, beams, 40)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_combination(family, attention, length, block, beams):
    compare(family, attention, length, block, beams, 200)
