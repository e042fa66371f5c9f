"""``mixkvq eval generate``: greedy continuations with every scheme, and how long they stay those of the exact cache.

A prompt is read once, at once, and replayed into every cache; from there each continues by itself, one most likely
token after another, end tokens included, until it has as many as wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..compat import cache_argument
from ..fingerprint import identity
from .bits import bits_of, bits_over
from .replay import Prefill
from .results import Results
from .schemes import Scheme
from .stats import Interval, difference_interval, mean_interval
from .stream import Emit
from .texts import Window

Doubles = NDArray[np.float64]


def key_of(model: Any, prompt: Window, new_tokens: int, scheme: Scheme) -> dict[str, Any]:
    """What a measurement is found by."""
    return {
        "measure": "greedy",
        **identity(model),
        "domain": prompt.domain,
        "window": prompt.index,
        "text": prompt.digest,
        "new_tokens": new_tokens,
        "scheme": scheme.name,
        "details": scheme.details,
    }


def greedy(model: Any, prefill: Prefill, cache: Any, new_tokens: int) -> list[list[int]]:
    """The most likely tokens behind prompts of equal length.

    Parameters
    ----------
    model : causal language model
    prefill : Prefill
        Of B prompts.
    cache : transformers Cache, empty
    new_tokens : int

    Returns
    -------
    list
        For each prompt, `new_tokens` tokens.
    """
    with torch.inference_mode():
        prefill.replay(cache)
        tokens = [prefill.logits[:, -1:].argmax(-1)]
        while len(tokens) < new_tokens:
            tokens.append(model(tokens[-1], **cache_argument(cache)).logits[:, -1:].argmax(-1))
    found: list[list[int]] = torch.cat(tokens, 1).tolist()
    return found


def measure(
    model: Any,
    prompts: Sequence[Window],
    new_tokens: int,
    schemes: Sequence[Scheme],
    results: Results,
    emit: Emit,
    batch: int = 4,
) -> None:
    """Continue all prompts, which have the same length, with every scheme, where ``results`` does not hold it yet.

    `emit` is told of ("chunk", (done, total)) after every batch.
    """
    total, done = len(prompts) * len(schemes), 0
    for at in range(0, len(prompts), batch):
        part, prefill = prompts[at : at + batch], None
        for scheme in schemes:
            keys = [key_of(model, prompt, new_tokens, scheme) for prompt in part]
            if any(results.find(key) is None for key in keys):
                prefill = prefill or Prefill.record(model, torch.tensor([prompt.ids for prompt in part]))
                cache = scheme.cache(model)
                found, bits = greedy(model, prefill, cache, new_tokens), bits_of(cache)
                for key, tokens in zip(keys, found, strict=True):
                    if results.find(key) is None:
                        results.add(key, {"tokens": tokens, **bits})
            done += len(part)
            emit("chunk", (done, total))


def kept(tokens: Sequence[int], exact: Sequence[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(tokens, exact, strict=True)) if a != b), len(exact))


@dataclass(frozen=True)
class Summary:
    """One scheme over some prompts."""

    scheme: Scheme
    true_bits: float | None
    effective_bits: float | None
    identical: Interval
    """Share of prompts whose whole continuation is that of the exact cache."""
    kept: Interval
    """Tokens before the first other one: as many as there are, where there is none."""
    median: float
    """Of these."""
    kept_change: Interval
    """Their mean less the baseline's, paired."""


def summarize(
    model: Any,
    prompts: Sequence[Window],
    new_tokens: int,
    schemes: Sequence[Scheme],
    results: Results,
    exact: Scheme,
    baseline: Scheme,
) -> list[Summary]:
    """What ``results`` holds, one row per scheme. All prompts must have been continued."""

    def values(scheme: Scheme) -> list[dict[str, Any]]:
        return results.rows((key_of(model, p, new_tokens, scheme) for p in prompts), f"scheme {scheme.name}")

    truth = values(exact)

    def lengths(rows: list[dict[str, Any]]) -> Doubles:
        pairs = zip(rows, truth, strict=True)
        return np.array([kept(row["tokens"], right["tokens"]) for row, right in pairs], np.float64)

    base, summaries = lengths(values(baseline)), []
    for scheme in schemes:
        rows = values(scheme)
        same = lengths(rows)
        true_bits, effective_bits = bits_over(rows)
        summaries.append(
            Summary(
                scheme=scheme,
                true_bits=true_bits,
                effective_bits=effective_bits,
                identical=mean_interval((same == new_tokens).astype(np.float64)),
                kept=mean_interval(same),
                median=float(np.median(same)),
                kept_change=difference_interval(same, base),
            )
        )
    return summaries
