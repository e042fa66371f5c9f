"""How many bits every key channel got, read from the packed records themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policy.patterns import TIER_BITS


@dataclass(frozen=True)
class CacheBits:
    """Bits of a `MixKVQCache`."""

    true_bits: float
    effective_bits: float
    paths: dict[str, int]
    """Layers by path: ``{"packed": 30}``."""
    per_channel: NDArray[np.float64]
    """[layers, KV heads, head_dim] mean bits of a key code over all records; NaN where nothing is packed."""


def records(layer: Any) -> Iterator[tuple[int, bytes]]:
    """All records of a cache layer as (KV head, bytes): rows, heads, blocks in order; nothing for a layer without."""
    store = getattr(layer, "store", None)
    if store is None:
        return
    for row, blocks in enumerate(store.blocks.tolist()):
        for head in range(store.place.shape[1]):
            for block in range(blocks):
                yield head, store.record(row, head, block)


def cache_bits(cache: Any) -> CacheBits:
    """Collect the bits of a cache from its report and its records."""
    from .._core import inspect

    report = cache.report()
    layers: list[dict[int, list[NDArray[np.float64]]]] = []
    bits = np.asarray(TIER_BITS, dtype=np.float64)
    for layer in cache.layers:
        heads: dict[int, list[NDArray[np.float64]]] = {}
        for head, record in records(layer):
            tier = np.frombuffer(bytes(inspect(record)["tier"]), dtype=np.uint8)
            heads.setdefault(head, []).append(bits[tier])
        layers.append(heads)
    known = [codes for heads in layers for codes in heads.values()]
    shape = (len(layers), max((max(h) + 1 for h in layers if h), default=1), len(known[0][0]) if known else 1)
    mean = np.full(shape, np.nan)
    for index, heads in enumerate(layers):
        for head, codes in heads.items():
            mean[index, head, : len(codes[0])] = np.mean(codes, axis=0)
    paths = dict(Counter(layer.path for layer in report.layers))
    return CacheBits(report.true_bits, report.effective_bits, paths, mean)
