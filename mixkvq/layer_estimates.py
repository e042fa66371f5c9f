"""`LayerEstimate`: the bytes that one layer of a cache will hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from . import ops
from .config import MixKVQConfig
from .layer import NATIVE, PACKED
from .queries import QueryStatistics
from .shapes import CachedLayer, storage_bytes
from .sizes import Amount, MeasuredRecords, record_amount
from .states import codec_of, common_dtype, obstacle
from .store import PackedStore, columns_at_once

_START = 8  # bytes per row: where its first real token is


@dataclass(frozen=True)
class LayerEstimate:
    """One layer.

    Attributes
    ----------
    index : int
    path : {"packed", "native"}
        As in `report.LayerReport`; a layer whose model reads no packed records is reported as dequantized, with the
        same bytes.
    record_bytes : Amount
        Of its records.
    record_elements : int
        Elements in them.
    other_bytes : int
        All else: sinks and window, key references, statistics, tables; everything of a native layer.
    elements : int
        Elements of K and V.
    dynamic_nbytes : int
        What this layer takes in a `DynamicCache`.
    passing_bytes : int
        The most held besides these bytes since the tokens before: what is packed, dense, and buffers.
    """

    index: int
    path: str
    record_bytes: Amount
    record_elements: int
    other_bytes: int
    elements: int
    dynamic_nbytes: int
    passing_bytes: int = 0

    @property
    def amount(self) -> Amount:
        """All bytes."""
        return self.record_bytes + Amount.of(self.other_bytes)

    @property
    def nbytes(self) -> int | None:
        """As `report.LayerReport.nbytes`; None where it depends on what is read."""
        return self.amount.rounded


def estimate_ours(
    index: int,
    config: MixKVQConfig,
    cached: CachedLayer,
    tokens: tuple[int, int],
    batch: int,
    measured: MeasuredRecords | None,
) -> LayerEstimate:
    """A layer that is packed if it can be; what a row holds besides records is asked of an empty `PackedStore`.

    Parameters
    ----------
    index, config, cached, batch, measured
        Of the layer.
    tokens : pair of int
        Read before, and now: at once if there were none before, else the others one by one.
    """
    before, count = tokens
    states = [s for s in (cached.keys, cached.values) if s is not None]
    one = batch * sum(s.heads * s.dim * s.dtype.itemsize for s in states)
    dense = one * count
    elements = batch * count * sum(s.heads * s.dim for s in states)
    besides = batch * cached.besides
    k, v = (s.tokens(count, batch, "cpu") for s in states)
    if obstacle(config, k, v) is not None:
        return LayerEstimate(index, NATIVE, Amount.of(0), 0, dense + besides, elements, dense + besides)
    heads, dim = k.shape[1], k.shape[3]
    had, blocks = config.due_blocks(before), config.due_blocks(count)
    if blocks == 0:
        queries = QueryStatistics(config.salience)
        queries.allocate(1, heads, dim, k.device)
        other = dense + batch * (_START + sum(t.nbytes for t in queries.tensors()))
        return LayerEstimate(index, NATIVE, Amount.of(0), 0, other + besides, elements, dense + besides)
    codec = codec_of(config, k, v)
    row = PackedStore(config, codec, torch.zeros(1, dtype=torch.int64), heads, common_dtype(k, v))
    records = batch * heads * blocks
    column = batch * heads * ops.codec(codec).record_bound
    amount = record_amount(codec, measured)
    if before == 0:
        passing = dense + column * min(blocks, columns_at_once(column))
    else:
        passing = column if blocks > had else 0
        if had == 0:  # plain until the first block was due; what was packed since weighs more at some time
            passing += max(0, one * config.exact_capacity() - amount.least * (records - batch * heads))
    return LayerEstimate(
        index,
        PACKED,
        amount * records,
        2 * records * config.block_length * dim,
        batch * row.nbytes + records * row.place.element_size() + besides,
        elements,
        dense + besides,
        passing,
    )


def estimate_theirs(index: int, layer: Any, cached: CachedLayer, tokens: tuple[int, int], batch: int) -> LayerEstimate:
    """A layer that transformers keeps, empty: a copy is shown the tokens, which have no memory, the last one alone."""
    nbytes, elements = batch * cached.besides, batch * cached.elements
    if cached.keys is not None and cached.values is not None:
        shown = copy.copy(layer)
        for count in (tokens[1], 0) if tokens[0] == 0 else (tokens[1] - 1, 1):
            if count:
                shown.update(*(s.tokens(count, batch) for s in (cached.keys, cached.values)))
        nbytes += storage_bytes(vars(shown))
        elements = shown.keys.numel() + shown.values.numel()
    return LayerEstimate(index, NATIVE, Amount.of(0), 0, nbytes, elements, nbytes)
