"""What code may do to a cache without meaning to: reuse buffers, change masks, leave inference mode, forge sizes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from models import forward, lossless, paths, prompts, relative_gap, tiny
from transformers import DynamicCache

from mixkvq import MixKVQCache, arrays, ops
from mixkvq.compat import cache_argument
from mixkvq.hook import TAG

HUGE = 2**63 - 1


def test_short_inputs_are_copied():
    key, cache = torch.ones(1, 2, 5, 16), MixKVQCache()
    cache.update(key, key, 0)
    key.zero_()
    assert cache.layers[0].keys.sum() == 160


@pytest.mark.parametrize("tokens", [5, 300])
def test_tensors_that_go_in_and_come_out_can_be_copied_and_saved(tokens):
    key, cache = torch.randn(1, 2, tokens, 16), MixKVQCache()
    out = cache.update(key, key, 0)
    assert not vars(key) and torch.equal(out[0], key) and torch.equal(out[1], key)
    torch.save(key, io.BytesIO())
    for each in (*out, *cache.update(key, key, 0)):
        tag = getattr(each, TAG)
        for other in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert torch.equal(other, each) and getattr(other, TAG, None) is None
        assert getattr(each, TAG) is tag and tag.cache() is cache
    assert not any(map(vars, cache.layers[0].states))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("told", [False, True])
def test_a_cache_filled_by_update_is_read_packed(told, chunks):
    """Nobody computed with what those updates returned, which says nothing of the model.

    After several updates of full blocks it seems to say something, until the model's attention is seen.
    """
    model, inputs = tiny("llama"), prompts([90, 70])
    plain, cache = DynamicCache(), lossless(config=model.config) if told else lossless()
    forward(model, plain, inputs["input_ids"], inputs["attention_mask"])
    saved = [(layer.keys.clone(), layer.values.clone()) for layer in plain.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if chunks == 1 else "ignore")
        for index, states in enumerate(saved):
            for parts in zip(*(tensor.chunk(chunks, 2) for tensor in states), strict=True):
                cache.update(*parts, index)
        for states in saved:
            for tensor in states:
                tensor.zero_()
        if chunks == 1:
            assert "filled by update" in cache.layers[0].reason.what
        for step in range(3):
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, step + 1, dtype=torch.long)], 1)
            want, got = (forward(model, each, torch.tensor([[5], [6]]), mask) for each in (plain, cache))
            assert relative_gap(got, want) <= 1e-5  # of exact attention, see mixkvq.h
    assert paths(cache) == ["packed"] * len(saved)
    assert "proved" in cache.layers[0].reason.what
    if chunks == 1:
        assert cache.layers[0].dequantizations == 0 and cache.layers[0].store.start.tolist() == [0, 20]


def test_attention_that_is_never_seen_packs_one_step_later():
    model, cache, ids = tiny("bloom", "eager"), lossless(), torch.tensor([[5]])
    forward(model, cache, prompts([90])["input_ids"])
    assert paths(cache)[0] == "native" and "filled by update" in cache.layers[0].reason.what
    with pytest.warns(UserWarning, match="does not pass through"):
        forward(model, cache, ids)
        forward(model, cache, ids)
    assert paths(cache) == ["dequantized"] * len(cache.layers)
    assert all(layer.store.blocks.tolist() == [2] for layer in cache.layers)


@pytest.mark.parametrize("move", ["reorder", "select", "repeat"])
def test_moving_rows_in_inference_mode_and_going_on_outside(move):
    model, inputs = tiny("llama"), prompts([40, 40])
    cache, plain = MixKVQCache(), DynamicCache()
    rows = torch.tensor([1, 0])
    for each in (cache, plain):
        with torch.inference_mode():
            model(**inputs, **cache_argument(each))
            if move == "reorder":
                each.reorder_cache(rows)
            elif move == "select":
                each.batch_select_indices(rows)
            else:
                each.batch_repeat_interleave(2)
    batch = 4 if move == "repeat" else 2
    with torch.no_grad():
        got, want = (model(torch.full((batch, 1), 7), **cache_argument(each)).logits for each in (cache, plain))
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shown", ["no mask", "all ones"])
def test_padding_that_becomes_visible_is_reported(shown):
    model, inputs, cache = tiny("llama"), prompts([60, 50]), lossless(32)
    forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    mask = None if shown == "no mask" else torch.ones(2, 61, dtype=torch.int64)
    with pytest.warns(UserWarning, match="hidden as padding"):
        forward(model, cache, torch.full((2, 1), 7), mask)


def test_the_same_padding_is_not_reported():
    model, inputs, cache = tiny("llama"), prompts([60, 50]), lossless(32)
    forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = forward(model, cache, torch.full((2, 1), 7), mask)
    assert logits.isfinite().all() and cache.report().layers[0].path == "packed"


def test_a_key_reference_lives_as_long_as_a_coded_record():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 200, 16, generator=generator)
    fields = {"block_length": 32, "residual_length": 32, "key_group_size": 32, "sink_length": 0}

    def packed(first_block: torch.Tensor, *, crop: bool) -> MixKVQCache:
        cache = MixKVQCache(**fields)
        start = torch.cat([first_block, key[:, :, 32:96] + 5], 2)
        with pytest.warns(UserWarning, match="decoded"):  # nobody attends
            cache.update(start[:, :, :64], start[:, :, :64], 0)
            cache.update(start[:, :, 64:], start[:, :, 64:], 0)
            cache.update(key[:, :, :1], key[:, :, :1], 1)
        if crop:
            cache.crop(-(cache.get_seq_length() - 32))
        return cache

    cache = packed(torch.full((1, 1, 32, 16), torch.nan), crop=False)
    store = cache.layers[0].store
    assert store.blocks.tolist() == [3] and store.has_mu.tolist() == [[1]]
    store.crop(32)
    assert store.blocks.tolist() == [1] and store.has_mu.tolist() == [[0]]  # only the exact record is left
    coded = packed(key[:, :, :32], crop=False).layers[0].store
    coded.crop(32)
    assert coded.has_mu.tolist() == [[1]]


def test_sizes_that_would_overflow_are_refused():
    window = np.zeros((1, 1, 40, 16), np.float32)
    query, start = np.zeros((1, 1, 1, 16), np.float32), np.array([HUGE])
    with pytest.raises(ValueError, match="mask"):
        arrays.attend(query, [[[]]], window, window, [40], start=start, mask=np.ones((1, 1, 1, 40), bool))
    k, v, exact, none = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 16), torch.tensor([HUGE]), torch.zeros(1).long()
    handle = ops.layer(k, v, exact, none, 0, [], torch.zeros(1, 1, 0, dtype=torch.int64), none)
    with pytest.raises(ValueError, match="exact is 9223372036854775807"):
        ops.append(handle, k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match="first is 9223372036854775807"):
        ops.unpack(handle, k, v, exact)
    assert exact.tolist() == [HUGE] and not k.any()
