"""Recorded queries over what a cache gives back: against the model, by hand, and exact where nothing is lost."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import VOCABULARY, forward, tiny

from mixkvq import MixKVQCache
from mixkvq.eval.attention import CHUNK, ExactAttention, LayerStates, Seen, through_cache
from mixkvq.eval.memory import CodedLayer
from mixkvq.eval.replay import Prefill
from mixkvq.eval.schemes import parse_scheme
from mixkvq.eval.tiers import records

TOKENS, PROMPT, SINK = 230, 4 + 2 * 64, 4
FIELDS = {"sink_length": SINK, "block_length": 64, "residual_length": 64}
FAMILIES = [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("mistral", "sdpa")]


def text(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(5))


def states(model: Any, tokens: int = TOKENS) -> list[LayerStates]:
    return [LayerStates.of_call(call) for call in Prefill.record(model, text(tokens)).calls]


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_attention_is_the_model_s(family: str, attention: str) -> None:
    model = tiny(family, attention)
    calls = Prefill.record(model, text()).calls
    found = [LayerStates.of_call(call) for call in calls]
    for call, layer in zip(calls, found, strict=True):
        got = layer.attend(layer.logits(layer.key, 0), layer.value, 0)
        assert torch.allclose(got.transpose(0, 1), call.result[0][0], atol=1e-4, rtol=1e-4)
        later = layer.attend(layer.logits(layer.key, 100), layer.value, 100)
        assert torch.allclose(later, got[:, 100:], atol=1e-5)
    assert [layer.window for layer in found] == [48 if i in model_windows(model) else None for i in (0, 1)]
    assert (found[0].softcap is not None) == (family == "gemma2") and (found[0].sinks is not None) == (
        family == "gpt_oss"
    )


def model_windows(model: Any) -> list[int]:
    from transformers import DynamicCache

    return [i for i, layer in enumerate(DynamicCache(config=model.config).layers) if layer.is_sliding]


def test_other_attention_is_refused() -> None:
    call = Prefill.record(tiny(attention="eager"), text()).calls[1]
    hidden = call.rest[0].clone()
    hidden[..., 5] = torch.finfo(hidden.dtype).min
    with pytest.raises(ValueError, match="layer 1 is masked in a way that is neither causal nor a sliding window"):
        LayerStates.of_call(replace(call, rest=(hidden,)))
    with pytest.raises(ValueError, match="layer 1 computes something else than softmax attention"):
        LayerStates.of_call(replace(call, result=(call.result[0] * 1.01, None)))
    with pytest.raises(ValueError, match="layer 1 computes something else"):
        LayerStates.of_call(replace(call, arguments={**call.arguments, "scaling": 0.2}))
    with pytest.raises(ValueError, match="layer 1 has keys"):
        LayerStates.of_call(replace(call, value=call.value[..., :8]))


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
@pytest.mark.parametrize("name", ["default", "kivi-2", "lossless", "simulated/default"])
def test_layer_alone_is_coded_as_in_the_model(family: str, attention: str, name: str) -> None:
    """Path, bytes, and every key and value that attention sees."""
    model, scheme = tiny(family, attention), parse_scheme(name, FIELDS)
    real = scheme.cache(model)
    forward(model, real, text()[:, :PROMPT])
    for layer in states(model):
        seen = through_cache(layer, scheme.cache(model), PROMPT)
        told = real.report().layers[layer.layer]
        assert seen.coded == CodedLayer(told.path, told.record_bytes, told.record_elements)
        theirs = real.layers[layer.layer]
        assert torch.equal(seen.key[:, -TOKENS + PROMPT :], layer.key[:, PROMPT:])
        kept = seen.key.shape[1] - (TOKENS - PROMPT)
        for mine, others in ((seen.key, theirs.keys), (seen.value, theirs.values)):
            # the model reads fewer tokens at once, so it rounds otherwise, and a code at the edge may flip
            far = (mine[:, :kept] - others[0, :, -kept:]).abs() > 1e-4
            assert float(far.double().mean()) < 1e-3
        if type(real) is MixKVQCache and told.path == "packed":
            mine = list(records(seen.cache.layers[layer.layer]))
            assert len(mine) == len(list(records(theirs))) == 2 * 2  # heads, blocks


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
@pytest.mark.parametrize("name", ["exact", "lossless", "simulated/lossless"])
def test_nothing_is_lost_without_quantization(family: str, attention: str, name: str) -> None:
    model = tiny(family, attention)
    for layer in states(model):
        found = ExactAttention(layer, PROMPT, SINK).errors(
            through_cache(layer, parse_scheme(name, FIELDS).cache(model), PROMPT)
        )
        for error in ("logits", "output", "kl", "key", "value"):
            assert np.abs(getattr(found, error)).max() <= 1e-12, error
        assert found.logits.shape == found.output.shape == found.kl.shape == (4, -(-(TOKENS - PROMPT) // CHUNK))
        assert found.key.shape == found.value.shape == (2,)


def test_windowed_layers_lose_nothing_to_packing() -> None:
    model = tiny("mistral")
    seen = through_cache(states(model)[0], parse_scheme("default", FIELDS).cache(model), PROMPT)
    assert seen.coded == CodedLayer("native", 0, 0) and seen.key.shape[1] < TOKENS


def test_errors_against_plain_loops() -> None:
    model = tiny("gpt_oss", "eager")
    layer = states(model)[1]  # full attention, learned sinks
    r = torch.Generator().manual_seed(0)
    key, value = (t + 0.3 * torch.randn(t.shape, generator=r) for t in (layer.key, layer.value))
    found = ExactAttention(layer, PROMPT, SINK).errors(Seen(key, value, CodedLayer("", 0, 0), None))
    wrong = {name: np.zeros(2) for name in ("logits", "output")}
    kl = []
    head = 3
    for query in range(PROMPT + CHUNK, TOKENS):
        q, outputs, logits, weights = layer.query[head, query].double(), [], [], []
        for k, v in ((layer.key[1].double(), layer.value[1].double()), (key[1].double(), value[1].double())):
            scores = (k[: query + 1] @ q) * layer.scaling
            total = torch.cat([scores, layer.sinks[head : head + 1].double()]).logsumexp(0)
            weights.append(scores - total)
            logits.append(scores[SINK:PROMPT])
            outputs.append((scores - total).exp() @ v[: query + 1])
        kl.append(float((weights[0].exp() * (weights[0] - weights[1])).sum()))
        for name, (exact, other) in (("logits", logits), ("output", outputs)):
            wrong[name] += [float(((other - exact) ** 2).sum()), float((exact**2).sum())]
    assert CHUNK < TOKENS - PROMPT <= 2 * CHUNK
    for name, (above, below) in wrong.items():
        assert getattr(found, name)[head, 1] == pytest.approx(above / below, rel=1e-4)
    assert found.kl[head, 1] == pytest.approx(np.mean(kl), rel=1e-3)
    part = slice(SINK, PROMPT)
    expected = ((key - layer.key)[1, part] ** 2).sum() / (layer.key[1, part] ** 2).sum()
    assert found.key[1] == pytest.approx(float(expected), rel=1e-5)


def test_scaled_keys_have_the_error_of_their_scale() -> None:
    layer = states(tiny())[0]
    key = layer.key.clone()
    key[:, SINK:PROMPT] *= 1.125
    found = ExactAttention(layer, PROMPT, SINK).errors(Seen(key, layer.value, CodedLayer("", 0, 0), None))
    assert found.logits == pytest.approx(np.full((4, 2), 0.125**2), rel=1e-4)
    assert found.key == pytest.approx(np.full(2, 0.125**2), rel=1e-5) and not found.value.any()
    assert (found.kl > 0).all() and (found.output > 0).all()
