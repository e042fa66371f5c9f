"""A replayed prompt leaves a cache exactly as the model itself would have left it."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import VOCABULARY, forward, paths, tiny
from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.eval.forced import forced_logits
from mixkvq.eval.replay import Prefill
from mixkvq.eval.tiers import records

PROMPT, TOTAL = 150, 200
FAMILIES = [("llama", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("mistral", "sdpa")]


def text(seed: int = 5) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (1, TOTAL), generator=torch.Generator().manual_seed(seed))


def packed(model, preset: str = "default") -> MixKVQCache:
    fields = {"key_group_size": 64} if preset == "compact" else {}
    return MixKVQCache(preset, config=model.config, sink_length=4, block_length=64, residual_length=64, **fields)


def all_records(cache: MixKVQCache) -> list[list[tuple[int, bytes]]]:
    return [list(records(layer)) for layer in cache.layers]


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_exact_cache_goes_on_bit_for_bit(family: str, attention: str) -> None:
    model, ids = tiny(family, attention), text()
    real, replayed = DynamicCache(config=model.config), DynamicCache(config=model.config)
    last = forward(model, real, ids[:, :PROMPT], logits_to_keep=1)
    prefill = Prefill.record(model, ids[:, :PROMPT])
    prefill.replay(replayed)
    assert prefill.tokens == PROMPT and torch.equal(prefill.logits[0, -1], last[0, -1])
    for mine, theirs in zip(replayed.layers, real.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert torch.equal(forward(model, replayed, ids[:, PROMPT:]), forward(model, real, ids[:, PROMPT:]))


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
@pytest.mark.parametrize("preset", ["default", "compact", "kivi-2"])
def test_packed_cache_has_the_records_of_a_real_forward(family: str, attention: str, preset: str) -> None:
    model, ids = tiny(family, attention), text()
    real, replayed = packed(model, preset), packed(model, preset)
    forward(model, real, ids[:, :PROMPT])
    Prefill.record(model, ids[:, :PROMPT]).replay(replayed)
    assert paths(replayed) == paths(real)
    found = all_records(replayed)
    assert found == all_records(real)
    layers_with_records = [i for i, path in enumerate(paths(real)) if path == "packed"]
    assert [i for i, layer in enumerate(found) if len(layer) == 2 * 2] == layers_with_records  # 2 heads, 2 blocks
    assert torch.equal(forward(model, replayed, ids[:, PROMPT:160]), forward(model, real, ids[:, PROMPT:160]))


def test_nothing_changes_the_recording() -> None:
    """Packed, simulated and exact caches, and going on with them, in any order."""
    from mixkvq.eval.schemes import parse_scheme

    model, ids = tiny(), text()
    prefill = Prefill.record(model, ids[:, :PROMPT])
    kept = [(c.query.clone(), c.key.clone(), c.value.clone(), c.result[0].clone()) for c in prefill.calls]
    schemes = [
        parse_scheme(name, {"sink_length": 4, "block_length": 64, "residual_length": 64})
        for name in ("default", "simulated/default", "int4-token", "random-tiers")
    ] + [parse_scheme("exact")]

    def read(scheme) -> torch.Tensor:
        return torch.cat(list(forced_logits(model, ids, prefill, scheme.cache(model), [160, TOTAL])))

    first = [read(scheme) for scheme in schemes]
    for scheme, logits in reversed(list(zip(schemes, first, strict=True))):
        assert torch.equal(read(scheme), logits), scheme.name
    for call, tensors in zip(prefill.calls, kept, strict=True):
        for now, before in zip((call.query, call.key, call.value, call.result[0]), tensors, strict=True):
            assert torch.equal(now, before)
    assert not torch.equal(first[0], first[-1])


def test_forced_logits_come_from_every_position_behind_the_prompt() -> None:
    model, ids = tiny(), text()
    prefill = Prefill.record(model, ids[:, :PROMPT])
    with torch.no_grad():
        whole = model(ids).logits[0, PROMPT:]
    chunks = list(forced_logits(model, ids, prefill, DynamicCache(config=model.config), [151, 180, TOTAL]))
    assert [len(chunk) for chunk in chunks] == [1, 29, 20]
    assert torch.allclose(torch.cat(chunks), whole, atol=1e-4, rtol=0)


def test_calls_hold_what_the_layers_computed() -> None:
    model, ids = tiny(), text()
    calls = Prefill.record(model, ids[:, :PROMPT]).calls
    assert [call.layer for call in calls] == [0, 1]
    for call in calls:
        assert call.query.shape == (1, 4, PROMPT, 16) and call.key.shape == call.value.shape == (1, 2, PROMPT, 16)
        assert call.result[0].shape == (1, PROMPT, 4, 16)


def test_attention_lookup_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixkvq import compat

    owner, name = compat.attention_lookup()
    before = getattr(owner, name)
    Prefill.record(tiny(), text()[:, :20])
    assert getattr(owner, name) is before
    with pytest.raises(IndexError):
        Prefill.record(tiny(), torch.full((1, 3), VOCABULARY + 5))
    assert getattr(owner, name) is before


@pytest.mark.parametrize(("family", "attention", "layers"), [("bloom", "eager", [0, 1]), ("qwen3_next", "sdpa", [0])])
def test_layers_that_cannot_be_observed_are_named(family: str, attention: str, layers: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"attention of layers \[{', '.join(map(str, layers))}\] cannot be observed"):
        Prefill.record(tiny(family, attention), text()[:, :20])
