"""Simulated caches: the packed path's numbers where they claim them, the stated schedule, and honest rivals."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import VOCABULARY, forward, prompts, tiny

from mixkvq import MixKVQConfig
from mixkvq.eval.replay import Prefill
from mixkvq.eval.rivals import SIMULATED
from mixkvq.eval.schemes import parse_scheme

BLOCK, SINK = 64, 4
FIELDS = {"sink_length": SINK, "block_length": BLOCK, "residual_length": BLOCK}
PRESETS = ["default", "compact:key_group_size=64", "kivi-2", "lossless", "default:salience=mean_abs:value_bits=4"]


def text(n: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


def both(preset: str, model: Any, **fields: Any) -> tuple[Any, Any]:
    common = {**FIELDS, **fields}
    return parse_scheme(preset, common).cache(model), parse_scheme(f"simulated/{preset}", common).cache(model)


def assert_same_layer(packed: Any, simulated: Any, index: int) -> None:
    """Decoded keys and values bit for bit, and bytes."""
    a, b = packed.layers[index], simulated.layers[index]
    for name in ("keys", "values"):
        assert torch.equal(getattr(a, name), getattr(b, name)), f"{name} of layer {index}"
    told, theirs = packed.report().layers[index], simulated.report().layers[index]
    assert told.path == "packed" and theirs.path == "simulated"
    assert (told.record_bytes, told.record_elements) == (theirs.record_bytes, theirs.record_elements)


@pytest.mark.parametrize("preset", PRESETS)
def test_prompt_is_coded_as_on_the_packed_path(preset: str) -> None:
    model = tiny(head_dim=64)
    prefill = Prefill.record(model, text(300))
    packed, simulated = both(preset, model)
    for cache in (packed, simulated):
        prefill.replay(cache)
    for index in (0, 1):
        assert_same_layer(packed, simulated, index)
        assert packed.report().layers[index].record_elements == 2 * 2 * 4 * BLOCK * 64  # K and V, 2 heads, 4 blocks
    exact = prefill.calls[0].key
    changed = (simulated.layers[0].keys != exact).any(1).any(2)[0]
    assert changed[SINK : SINK + 4 * BLOCK].all() == (preset != "lossless")


@pytest.mark.parametrize("preset", ["default", "kivi-2"])
def test_later_blocks_are_coded_as_on_the_packed_path(preset: str) -> None:
    """Layer 0's keys do not depend on the cache, so it can be compared after any number of steps."""
    model, ids = tiny(head_dim=64), text(300)
    packed, simulated = both(preset, model)
    at = 0
    for step in (90, 1, 1, 37, 64, 5, 100, 2):  # blocks fall due in the middle and at the end of a call
        for cache in (packed, simulated):
            forward(model, cache, ids[:, at : at + step])
        at += step
        if packed.layers[0].store is not None:
            assert_same_layer(packed, simulated, 0)
    assert packed.report().layers[0].record_elements == 2 * 2 * 4 * BLOCK * 64


@pytest.mark.parametrize("preset", ["default", "kivi-2"])
def test_rows_of_a_padded_batch(preset: str) -> None:
    model, lengths = tiny(head_dim=64), (200, 137, 90)
    inputs = prompts(lengths)
    packed, simulated = both(preset, model)
    for cache in (packed, simulated):
        forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    for index in (0, 1):
        a, b = packed.layers[index], simulated.layers[index]
        for row, n in enumerate(lengths):
            for name in ("keys", "values"):
                assert torch.equal(getattr(a, name)[row, :, -n:], getattr(b, name)[row, :, -n:]), (name, row)
        blocks = sum((n - SINK) // BLOCK for n in lengths)
        told, theirs = packed.report().layers[index], simulated.report().layers[index]
        assert told.record_elements == theirs.record_elements == 2 * 2 * blocks * BLOCK * 64
        assert told.record_bytes == theirs.record_bytes


@pytest.mark.parametrize(("sink", "residual"), [(0, 64), (4, 64), (7, 100)])
@pytest.mark.parametrize("name", ["simulated/default", "int4-token", "kitty:key_group_size=64", "random-tiers"])
def test_schedule(name: str, sink: int, residual: int) -> None:
    """Sinks and the newest tokens stay exact; a block is coded when R tokens stand behind the coded ones."""
    model, n = tiny(head_dim=64), 230
    scheme = parse_scheme(name, {**FIELDS, "sink_length": sink, "residual_length": residual})
    prefill, cache = Prefill.record(model, text(n)), scheme.cache(model)
    prefill.replay(cache)
    blocks = max(0, n - sink - residual) // BLOCK + 1
    for call, layer in zip(prefill.calls, cache.layers, strict=True):
        changed = ((layer.keys != call.key) | (layer.values != call.value)).any(1).any(2)[0]
        first, end = sink, sink + blocks * BLOCK
        assert changed[first:end].all() and not changed[:first].any() and not changed[end:].any()


def test_effective_bits_count_what_is_exact() -> None:
    model, n = tiny(head_dim=64), 100
    cache = parse_scheme("int4-token", FIELDS).cache(model)
    Prefill.record(model, text(n)).replay(cache)
    report = cache.report()
    coded = 2 * 2 * BLOCK * 64  # per layer: K and V, heads, tokens, channels
    true = 4 + 32 / 64  # codes, and two float16 per 64 channels
    assert report.true_bits == true
    assert report.effective_bits == pytest.approx((true * BLOCK + 32 * (n - BLOCK)) / n)
    assert report.layers[0].record_elements == coded


def test_reordered_rows_take_their_blocks_along() -> None:
    """After a swap, rows go on where they were: the key references of `default` belong to a row."""
    model, inputs = tiny(head_dim=64), prompts((200, 150))
    packed, simulated = both("default", model)
    more = text(140, seed=8)[0].view(2, 70)
    for cache in (packed, simulated):
        forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = torch.cat([inputs["attention_mask"].flip(0), torch.ones(2, 70, dtype=torch.int64)], 1)
        forward(model, cache, more, mask)
    for row, n in enumerate((220, 270)):
        assert torch.equal(packed.layers[0].keys[row, :, -n:], simulated.layers[0].keys[row, :, -n:])


def test_crop_is_refused() -> None:
    model = tiny(head_dim=64)
    cache = parse_scheme("simulated/default", FIELDS).cache(model)
    Prefill.record(model, text(100)).replay(cache)
    with pytest.raises(NotImplementedError, match="simulated cache cannot be cropped"):
        cache.crop(-3)


# ---- rivals --------------------------------------------------------------------------------------------------------
def block(seed: int = 0, heads: int = 2, tokens: int = 128, dim: int = 64) -> tuple[Any, Any]:
    r = np.random.default_rng(seed)
    k = r.normal(size=(heads, tokens, dim)) * r.lognormal(0, 1, (heads, 1, dim)) + r.normal(0, 3, (heads, 1, dim))
    return k.astype(np.float32), r.normal(size=k.shape).astype(np.float32)


def rival(name: str, **fields: Any) -> Any:
    return SIMULATED[name](fields)


def state(**more: Any) -> dict[str, Any]:
    return {"dtype": "float32", "layer": 0, "block": 0, **more}


def test_int4_token_is_within_half_a_step() -> None:
    """Step: a token's range over 15, stored in float16 with its offset, which costs at most 2**-10 of both more."""
    k, v = block()
    for given, decoded in zip((k, v), rival("int4-token").code(k, v, None, state())[:2], strict=True):
        low, high = given.min(2, keepdims=True), given.max(2, keepdims=True)
        bound = (high - low) / 15 / 2 + 2.0**-10 * (high - low + np.abs(low))
        error = np.abs(decoded - given)
        assert (error <= bound).all() and (error > bound / 4).mean() > 0.5  # coded, and no finer than it says
        assert max(len(np.unique(token)) for token in decoded.reshape(-1, 64)) <= 16


def test_rotated_tokens_are_within_half_a_step_after_rotation() -> None:
    from mixkvq.reference import hadamard

    k, v = block()
    decoded = rival("hadamard-token").code(k, v, None, state())[0]
    given, coded = hadamard(k), hadamard(decoded)
    low, high = given.min(2, keepdims=True), given.max(2, keepdims=True)
    bound = (high - low) / 7 / 2 + 2.0**-10 * (high - low + np.abs(low))
    assert (np.abs(coded - given) <= bound).all()
    assert max(len(np.unique(np.round(token, 3))) for token in coded.reshape(-1, 64)) <= 8


@pytest.mark.parametrize(("name", "bits"), [("int4-token", 4.5), ("hadamard-token", 3.5)])
def test_bytes_per_token_by_hand(name: str, bits: float) -> None:
    k, v = block()
    assert 8 * rival(name).code(k, v, None, state())[2] / (k.size + v.size) == bits


def tiers_of(name: str, k: Any, importance: Any = None, **more: Any) -> Any:
    """Relative error of every key channel: the more bits, the smaller."""
    decoded = rival(name).code(k, np.zeros_like(k), importance, state(**more))[0]
    return np.abs(decoded - k).mean(1) / np.ptp(k, axis=1)


def test_rankings_follow_what_they_are_named_after() -> None:
    """The 16 channels that a ranking puts first get 4 bits, the last 16 get 2: a quarter of the levels."""
    k, _ = block()
    importance = np.random.default_rng(1).lognormal(0, 1, (2, 64)).astype(np.float32)
    for name, score in (("query-only", importance), ("magnitude", np.abs(k).mean(1))):
        error, order = tiers_of(name, k, importance), np.argsort(-score, axis=1)
        for head in (0, 1):
            assert error[head, order[head, :16]].max() < error[head, order[head, -16:]].min(), name
    assert np.array_equal(tiers_of("magnitude", k, importance), tiers_of("magnitude", k, importance[::-1]))
    assert not np.array_equal(tiers_of("query-only", k, importance), tiers_of("query-only", k, importance[::-1]))


def test_random_tiers_are_the_same_every_time_and_differ_by_block_and_layer() -> None:
    k, _ = block()
    first = tiers_of("random-tiers", k, layer=3, block=5)
    assert np.array_equal(first, tiers_of("random-tiers", k, layer=3, block=5))
    assert not np.array_equal(first, tiers_of("random-tiers", k, layer=4, block=5))
    assert not np.array_equal(first, tiers_of("random-tiers", k, layer=3, block=6))


def test_rankings_take_equal_bytes() -> None:
    k, v = block()
    names = ("query-only", "magnitude", "random-tiers")
    sizes = {rival(name).code(k, v, np.ones((2, 64), np.float32), state())[2] for name in names}
    assert len(sizes) == 1
    plan = MixKVQConfig.preset("default", key_patterns=({4: 16, 3: 32, 2: 16},))
    bits = 8 * sizes.pop() / (k.size + v.size)
    assert bits == pytest.approx(3.28, abs=0.01) and plan.residual_length == 128


def test_kitty_gives_a_quarter_of_the_channels_four_bits() -> None:
    k, v = block()
    error = np.sort(tiers_of("kitty", k), axis=1)
    assert (error[:, 15] * 2 < error[:, 16]).all()  # 16 of 64 fine channels per head, then a gap
    assert 8 * rival("kitty").code(k, v, None, state())[2] / (k.size + v.size) == pytest.approx(2.6, abs=0.1)
