"""``mixkvq eval layers``: where a model's keys and queries are large, who gets the bits, and what every layer loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..fingerprint import identity
from .attention import Errors, ExactAttention, LayerStates, Seen, through_cache
from .bits import true_bits
from .operator import root
from .results import Results, rounded
from .schemes import Scheme
from .stats import Interval, mean_interval
from .stream import Emit
from .texts import Window
from .tiers import cache_bits

Doubles = NDArray[np.float64]
BLOCK = 128
"""Tokens over which the spread of a key channel is taken."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    window : Window
    prompt : int
        First tokens, which a cache codes; the queries behind them are compared.
    sink_length : int
        First tokens of the prompt that statistics and errors of logits, keys and values leave out.
    """

    window: Window
    prompt: int
    sink_length: int

    def key(self, model: Any, layer: int, scheme: Scheme | None) -> dict[str, Any]:
        """What a measurement is found by; without a scheme: the statistics of the layer."""
        return {
            "measure": "layers" if scheme else "layer statistics",
            **identity(model),
            "domain": self.window.domain,
            "window": self.window.index,
            "text": self.window.digest,
            "prefill": self.prompt,
            "sink_length": self.sink_length,
            "layer": layer,
            **({"scheme": scheme.name, "details": scheme.details} if scheme else {}),
        }


def statistics(states: LayerStates, prompt: int, sink_length: int) -> dict[str, Any]:
    """What a layer's queries and keys look like, per KV head and channel.

    Returns
    -------
    dict
        ``importance`` [H, D]: I_d, root mean square of the queries of the prompt; ``spread`` [H, D]: S_d, (max - min)/3
        of the keys, mean over blocks of 128 tokens; ``ln_a_sd`` [H]: standard deviation of ln A_d over the channels of
        a head, A_d = I_d S_d (channels with A_d = 0 left out).
    """
    heads = states.key.shape[0]
    q = states.query[:, :prompt].double().reshape(heads, -1, states.query.shape[2])
    importance = (q**2).mean(1).sqrt()
    blocks = [x for x in torch.split(states.key[:, sink_length:prompt].double(), BLOCK, 1) if x.shape[1] > 1]
    spread = torch.stack([x.amax(1) - x.amin(1) for x in blocks]).mean(0) / 3
    product = (importance * spread).numpy()
    deviation = np.array([np.log(a[a > 0]).std() if (a > 0).any() else 0.0 for a in product])
    return {
        "importance": rounded(importance),
        "spread": rounded(spread),
        "ln_a_sd": rounded(deviation),
    }


def _values(seen: Seen, errors: Errors, layer: int) -> dict[str, Any]:
    packed = getattr(seen.cache.layers[layer], "store", None) is not None
    return {
        "path": seen.coded.path,
        "record_bytes": seen.coded.nbytes,
        "record_elements": seen.coded.elements,
        "key_bits": rounded(cache_bits(seen.cache).per_channel[layer]) if packed else None,
        **{name: rounded(getattr(errors, name).mean(1)) for name in ("logits", "output", "kl")},
        **{name: rounded(getattr(errors, name)) for name in ("key", "value")},
    }


def measure(
    model: Any, layers: Sequence[LayerStates], schemes: Sequence[Scheme], plan: Plan, results: Results, emit: Emit
) -> None:
    """Measure what ``results`` does not hold yet; `emit` is told of ("chunk", (done, total)) each time."""
    total, done = len(layers) * len(schemes), 0
    for states in layers:
        key = plan.key(model, states.layer, None)
        if results.find(key) is None:
            results.add(key, statistics(states, plan.prompt, plan.sink_length))
        todo = [s for s in schemes if results.find(plan.key(model, states.layer, s)) is None]
        done += len(schemes) - len(todo)
        with torch.inference_mode():
            exact = ExactAttention(states, plan.prompt, plan.sink_length) if todo else None
            for scheme in todo:
                assert exact is not None
                seen = through_cache(states, scheme.cache(model), plan.prompt)
                results.add(plan.key(model, states.layer, scheme), _values(seen, exact.errors(seen), states.layer))
                done += 1
                emit("chunk", (done, total))
    emit("chunk", (total, total))


@dataclass(frozen=True)
class LayerSummary:
    """One scheme in one layer. Errors are relative L2 errors, root mean squares over heads."""

    layer: int
    path: str
    true_bits: float | None
    key_bits: float | None
    """Mean bits of a key's code."""
    key: float
    value: float
    logits: float
    output: float
    worst_head: int
    """Query head with the largest output error."""
    worst: float
    kl: float
    """Of the attention weights, mean over heads, nats."""
    ln_a_sd: float
    """Mean over heads."""


@dataclass(frozen=True)
class Maps:
    """Arrays of one text over all measured layers, for the figure; NaN where a layer has nothing to show."""

    layers: list[int]
    importance: Doubles
    """[layers, H, D]"""
    spread: Doubles
    key_bits: dict[str, Doubles]
    """Scheme -> [layers, H, D], for schemes with packed records."""
    logits: dict[str, Doubles]
    """Scheme -> [layers, Q] relative L2 error."""
    output: dict[str, Doubles]


def _rows(model: Any, layers: Sequence[int], scheme: Scheme | None, plan: Plan, results: Results) -> list[Any]:
    what = "the statistics of the layers" if scheme is None else f"scheme {scheme.name}"
    return results.rows((plan.key(model, layer, scheme) for layer in layers), what)


def summarize(model: Any, layers: Sequence[int], scheme: Scheme, plan: Plan, results: Results) -> list[LayerSummary]:
    """What ``results`` holds of one scheme, layer by layer."""

    def size(squares: list[float]) -> float:
        return float(np.sqrt(np.mean(squares)))

    found = []
    pairs = zip(_rows(model, layers, scheme, plan, results), _rows(model, layers, None, plan, results), strict=True)
    for layer, (row, about) in zip(layers, pairs, strict=True):
        bits, worst = row["key_bits"], int(np.argmax(row["output"]))
        found.append(
            LayerSummary(
                layer=layer,
                path=row["path"],
                true_bits=true_bits([row]),
                key_bits=None if bits is None else float(np.mean(bits)),
                **{name: size(row[name]) for name in ("key", "value", "logits", "output")},
                worst_head=worst,
                worst=float(np.sqrt(row["output"][worst])),
                kl=float(np.mean(row["kl"])),
                ln_a_sd=float(np.mean(about["ln_a_sd"])),
            )
        )
    return found


def pooled(model: Any, layers: Sequence[int], scheme: Scheme, plan: Plan, results: Results, name: str) -> Interval:
    """Root mean square over layers and heads of an error ("key", "value", "logits", "output"), with its interval."""
    rows = _rows(model, layers, scheme, plan, results)
    return root(mean_interval(np.concatenate([np.asarray(row[name], np.float64) for row in rows])))


def maps(model: Any, layers: Sequence[int], schemes: Sequence[Scheme], plan: Plan, results: Results) -> Maps:
    """What ``results`` holds, as arrays."""
    about = _rows(model, layers, None, plan, results)
    rows = {scheme.name: _rows(model, layers, scheme, plan, results) for scheme in schemes}
    bits = {name: stack([row["key_bits"] for row in found]) for name, found in rows.items()}
    return Maps(
        list(layers),
        stack([row["importance"] for row in about]),
        stack([row["spread"] for row in about]),
        {name: x for name, x in bits.items() if np.isfinite(x).any()},
        *(
            {name: np.sqrt(stack([row[error] for row in found])) for name, found in rows.items()}
            for error in ("logits", "output")
        ),
    )


def stack(parts: Sequence[Any]) -> Doubles:
    """Arrays of one number of axes along a new first one, short ones (or None) filled up with NaN."""
    arrays = [None if part is None else np.asarray(part, np.float64) for part in parts]
    known = [x.shape for x in arrays if x is not None]
    whole = np.full((len(arrays), *np.max(known, axis=0)) if known else (len(arrays), 1), np.nan)
    for row, x in zip(whole, arrays, strict=True):
        if x is not None:
            row[tuple(slice(0, n) for n in x.shape)] = x
    return whole
