"""``mixkvq eval operator``: codecs judged on the attention of real queries, keys and values in a file, without a model.

The text's first tokens are put into a scheme's cache, and the queries behind them attend to what it gives back. This
says what a codec does to each layer alone; how the layers' errors add up in a model, only `mixkvq eval kl` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from ..fingerprint import code_digest
from .attention import ExactAttention, through_cache
from .bits import true_bits
from .dump import Dump
from .results import Results, rounded
from .schemes import Scheme
from .stats import Interval, mean_interval, ratio_interval
from .stream import Emit

Doubles = NDArray[np.float64]


def check_prompt(prompt: int, tokens: int, sink_length: int) -> None:
    """Raise `UserError` unless there are coded tokens and queries behind them."""
    if not sink_length < prompt < tokens:
        raise UserError(f"--prefill is {prompt}, must be from {sink_length + 1} to {tokens - 1} ({tokens} tokens)")


def key_of(dump: Dump, layer: int, scheme: Scheme, prompt: int, sink_length: int) -> dict[str, Any]:
    """What a measurement is found by."""
    return {
        "measure": "operator",
        "code": code_digest(),
        "file": dump.digest,
        "name": dump.about["model"],
        "domain": dump.about["domain"],
        "text": dump.about["digest"],
        "prefill": prompt,
        "sink_length": sink_length,
        "layer": layer,
        "scheme": scheme.name,
        "details": scheme.details,
    }


def measure(dump: Dump, schemes: Sequence[Scheme], prompt: int, sink_length: int, results: Results, emit: Emit) -> None:
    """Measure what ``results`` does not hold yet; `emit` is told of ("chunk", (done, total)) each time."""
    total, done = len(dump.layers) * len(schemes), 0
    for layer in dump.layers:
        todo = [s for s in schemes if results.find(key_of(dump, layer, s, prompt, sink_length)) is None]
        done += len(schemes) - len(todo)
        if not todo:
            continue
        states = dump.read(layer)
        with torch.inference_mode():
            exact = ExactAttention(states, prompt, sink_length)
            for scheme in todo:
                seen = through_cache(states, scheme.cache(dump.model), prompt)
                found = exact.errors(seen)
                values = {
                    "path": seen.coded.path,
                    "record_bytes": seen.coded.nbytes,
                    "record_elements": seen.coded.elements,
                    "logits": rounded(found.logits),
                    "output": rounded(found.output),
                    "kl": rounded(found.kl),
                }
                results.add(key_of(dump, layer, scheme, prompt, sink_length), values)
                done += 1
                emit("chunk", (done, total))
    emit("chunk", (total, total))


@dataclass(frozen=True)
class Row:
    """One scheme over some layers."""

    scheme: Scheme
    layers: int
    paths: dict[str, int]
    true_bits: float | None
    logits: Interval
    """Root mean square over heads and chunks of queries of the relative L2 error."""
    output: Interval
    kl: Interval
    """Mean, nats."""
    ratio: Interval | None
    """KL relative to the baseline, paired by head and chunk."""


def summarize(
    dump: Dump,
    schemes: Sequence[Scheme],
    prompt: int,
    sink_length: int,
    results: Results,
    baseline: Scheme | None = None,
    layers: Sequence[int] | None = None,
) -> list[Row]:
    """What ``results`` holds of these layers (default: all), one row per scheme."""

    def values(scheme: Scheme) -> list[dict[str, Any]]:
        keys = (key_of(dump, i, scheme, prompt, sink_length) for i in layers or dump.layers)
        return results.rows(keys, f"scheme {scheme.name}")

    def cells(rows: list[dict[str, Any]], name: str) -> Doubles:
        return np.concatenate([np.asarray(row[name], np.float64).ravel() for row in rows])

    base = None if baseline is None else cells(values(baseline), "kl")
    summaries = []
    for scheme in schemes:
        rows = values(scheme)
        paths = [row["path"] for row in rows]
        kl = cells(rows, "kl")
        summaries.append(
            Row(
                scheme=scheme,
                layers=len(rows),
                paths={path: paths.count(path) for path in sorted(set(paths))},
                true_bits=true_bits(rows),
                logits=root(mean_interval(cells(rows, "logits"))),
                output=root(mean_interval(cells(rows, "output"))),
                kl=mean_interval(kl),
                ratio=None if base is None or not base.any() else ratio_interval(kl, base),
            )
        )
    return summaries


def root(x: Interval) -> Interval:
    """The square root of a value and its bounds."""
    return Interval(*(float(np.sqrt(part)) for part in (x.value, x.low, x.high)))
