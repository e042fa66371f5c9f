"""`Readings`: calibration text read once with the exact cache, against which any number of caches is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._core import inspect
from ..eval.bits import bits_of, true_bits
from ..eval.forced import forced_logits, kl_divergence
from ..eval.kl import Protocol
from ..eval.replay import Prefill
from ..eval.stats import stretches
from ..eval.texts import Window, windows
from ..eval.tiers import records
from ..sizes import MeasuredRecords

Doubles = NDArray[np.float64]


def calibration_windows(tokenizer: Any, domain: str, count: int, length: int) -> list[Window]:
    """The last ``count`` windows of a domain: `mixkvq eval` reads from its beginning on (`mixkvq.eval.texts.windows`).

    Of the built-in prose (more than 100,000 tokens) two windows of 2048 tokens here share no token with up to 17 there.
    """
    return windows(tokenizer, domain, count, length, last=True)


@dataclass(frozen=True)
class Measured:
    """One cache on the calibration text."""

    units: Doubles
    """KL divergence in nats, means over stretches of positions."""
    true_bits: float
    """0 where nothing is packed."""
    records: Mapping[int, MeasuredRecords]
    """Of every layer that has any."""

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats."""
        return float(self.units.mean())


class Readings:
    """Windows with their recorded first pass and the exact logits of their other positions.

    Parameters
    ----------
    model : causal language model
    texts : sequence of Window
        Of ``protocol.context`` tokens.
    protocol : Protocol
    """

    def __init__(self, model: Any, texts: Sequence[Window], protocol: Protocol) -> None:
        from transformers import DynamicCache

        self.model, self.protocol, self.texts = model, protocol, list(texts)
        self._read = []
        for text in texts:
            ids = torch.tensor([text.ids])
            prefill = Prefill.record(model, ids[:, : protocol.prefill])
            exact = list(forced_logits(model, ids, prefill, DynamicCache(config=model.config), protocol.ends))
            self._read.append((ids, prefill, exact))

    @property
    def prefills(self) -> list[Prefill]:
        """The first passes."""
        return [prefill for _, prefill, _ in self._read]

    def measure(self, make: Callable[[], Any]) -> Measured:
        """Compare caches, one per window, with the exact one; ``make`` gives an empty `MixKVQCache`."""
        kl, bits, caches = [], [], []
        for ids, prefill, exact in self._read:
            cache = make()
            other = forced_logits(self.model, ids, prefill, cache, self.protocol.ends)
            kl.append(torch.cat([kl_divergence(p, q) for p, q in zip(exact, other, strict=True)]).numpy())
            bits.append(bits_of(cache))
            caches.append(cache)
        return Measured(stretches(kl), true_bits(bits) or 0.0, measure_records(caches, self.model.dtype))


def measure_records(caches: Iterable[Any], dtype: torch.dtype) -> dict[int, MeasuredRecords]:
    """Mean length and exact channels of the records of every layer that has any; ``dtype`` is the model's."""
    found = dict[int, list[tuple[int, int]]]()
    for cache in caches:
        for index, layer in enumerate(cache.layers):
            for _, record in records(layer):
                found.setdefault(index, []).append((len(record), inspect(record)["channels"][-1]))
    name = str(dtype).removeprefix("torch.")
    return {index: MeasuredRecords(name, *np.mean(lengths, axis=0).tolist()) for index, lengths in found.items()}
