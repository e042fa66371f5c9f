"""Models spread over processes: layers without tokens, heads on their own, what is refused before the forward."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from models import forward, prompts, tiny

from mixkvq import MixKVQCache, MixKVQConfig, compat, list_presets, parallel
from mixkvq.fingerprint import fingerprint
from mixkvq.queries import QueryStatistics
from mixkvq.store import PackedStore


# ---- what is refused -----------------------------------------------------------------------------------------------
def spread(tp_size: int, family: str = "llama", tp_plan=None, **changes):
    """The configuration of a model as it is in a process of several."""
    config = copy.deepcopy(tiny(family, **changes).config)
    config.distributed_config = SimpleNamespace(tp_size=tp_size, tp_plan=tp_plan)
    return config


THREE = {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 96}


def test_heads_that_cannot_be_spread_are_refused():
    config, told = spread(2, **THREE), "num_key_value_heads is 3 and tp_size is 2: .* must be one of 1, 3, as in"
    with pytest.raises(ValueError, match=told):
        parallel.check_tensor_parallel(config)
    with pytest.raises(ValueError, match=told):
        parallel.check_tensor_parallel(SimpleNamespace(config=config, tp_plan=config.base_model_tp_plan))
    with pytest.raises(ValueError, match=told):
        MixKVQCache(config=config)
    config = spread(4, **THREE | {"num_key_value_heads": 6})
    with pytest.raises(ValueError, match=r"tp_size is 4: .* one of 1, 2, 3, 6, as in DistributedConfig\(tp_size=3\)"):
        MixKVQCache(config=config)


def test_what_needs_no_whole_heads_is_not_refused():
    for config in (
        tiny("llama", **THREE).config,
        spread(3, **THREE),
        spread(1, **THREE),
        spread(2, tp_plan={}, **THREE),  # nothing is spread
        spread(2, tp_plan={"layers.*.self_attn.k_proj": "colwise_gather_output"}, **THREE),
        spread(2, "phi3", **THREE),  # its fused projection is gathered
    ):
        assert len(MixKVQCache(config=config)) == 2
    parallel.check_tensor_parallel(torch.nn.Linear(2, 2))


def test_a_budget_for_all_heads_of_a_layer_is_refused():
    config = spread(2)
    with pytest.raises(ValueError, match=r"allocate is 'layer' and tp_size is 2: .* use allocate='budget'"):
        MixKVQCache(config=config, allocate="layer", key_budget=3)
    MixKVQCache(config=config, allocate="budget", key_budget=3)
    MixKVQCache(config=spread(1), allocate="layer", key_budget=3)


def test_a_calibration_is_for_the_model_however_it_is_spread():
    assert fingerprint(spread(2)) == fingerprint(tiny("llama").config)


@pytest.mark.parametrize("ask", ["generate", "forward"])
def test_a_cache_without_a_model_learns_in_time_who_asks(monkeypatch, ask):
    """Keys that are no whole heads would fail in the attention, before the cache sees them."""
    monkeypatch.setattr(parallel, "several_processes", lambda: True)
    model, inputs = copy.deepcopy(tiny("llama", **THREE)), prompts([20])
    model.config.distributed_config = SimpleNamespace(tp_size=2, tp_plan=None)
    cache, seen = MixKVQCache(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append("forward"))
    with pytest.raises(ValueError, match="num_key_value_heads is 3 and tp_size is 2"):
        if ask == "generate":
            model.generate(**inputs, **compat.cache_argument(cache), max_new_tokens=2)
        else:
            forward(model, cache, inputs["input_ids"])
    assert not seen and len(cache) == 0
    model.config.distributed_config.tp_size = 3
    forward(model, cache, inputs["input_ids"])
    assert cache.get_seq_length() == 20 and seen


# ---- a head depends on no other head -------------------------------------------------------------------------------
def packed(preset: str, heads: slice, dtype: torch.dtype, **fields) -> PackedStore:
    """A store of some of four KV heads (two query heads each): a prompt of two rows, and tokens until it packs again.

    Head 0 has a value that is not finite in its first block, so that one is an exact record.
    """
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 4, 400, 64, generator=generator) for _ in "kv")
    keys *= torch.tensor([8.0, 0.5, 1.0, 2.0]).view(4, 1, 1)
    keys[0, 0, 10, 5] = torch.inf
    queries = torch.randn(2, 8, 400, 64, generator=generator)
    config = MixKVQConfig.preset(preset, **fields)
    seen, start = QueryStatistics(config.salience), torch.tensor([0, 60])
    k, v = (t[:, heads].to(dtype) for t in (keys, values))
    q = queries.unflatten(1, (4, 2))[:, heads].flatten(1, 2).to(dtype)
    seen.add(q[:, :, :300], k.shape[1], start)
    codec = config.codec(64, str(dtype).removeprefix("torch."))
    store = PackedStore.begin(config, codec, k[:, :, :300], v[:, :, :300], start, seen)
    for at in range(300, 400, 20):
        store.queries.add(q[:, :, at : at + 20], k.shape[1], None)
        store.append(k[:, :, at : at + 20], v[:, :, at : at + 20])
        store.flush()
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", [*list_presets(), "budget"])
def test_records_of_a_head_depend_on_no_other_head(preset, dtype):
    """Nothing is random or pooled: two heads of four give the same bytes without the other two."""
    name, fields = ("default", {"allocate": "budget", "key_budget": 3}) if preset == "budget" else (preset, {})
    everything = packed(name, slice(0, 4), dtype, **fields)
    for part in (slice(0, 2), slice(2, 4), slice(3, 4)):
        some = packed(name, part, dtype, **fields)
        blocks = some.blocks.tolist()
        assert blocks == everything.blocks.tolist() == [3, 2]
        for row, count in enumerate(blocks):
            for here, head in enumerate(range(4)[part]):
                for block in range(count):
                    assert some.record(row, here, block) == everything.record(row, head, block)
        for field in ("k", "v", "mu", "has_mu"):
            mine, theirs = getattr(some, field), getattr(everything, field)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs[:, part])
    assert bool(everything.records.any_coded().all()) == (name != "lossless")


def test_a_budget_for_a_layer_is_what_depends_on_other_heads():
    fields = {"allocate": "layer", "key_budget": 3}
    everything, some = (packed("default", part, torch.float32, **fields) for part in (slice(0, 4), slice(2, 4)))
    assert any(everything.record(1, 2 + head, 0) != some.record(1, head, 0) for head in range(2))


def test_bytes_of_heads_add_up():
    """What two halves of the heads hold is what all hold, and once more what belongs to a row and not to a head."""
    for preset in list_presets():
        everything, *halves = (packed(preset, part, torch.float32) for part in (slice(0, 4), slice(0, 2), slice(2, 4)))
        rows = [everything.exact, everything.start, everything.blocks]
        if everything.queries.sum is not None:
            rows.append(everything.queries.count)
        assert sum(half.nbytes for half in halves) == everything.nbytes + sum(t.nbytes for t in rows)
        assert sum(half.totals().record_bytes for half in halves) == everything.totals().record_bytes
