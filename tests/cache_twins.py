"""A cache beside its `cache_model`: forward passes of a stack of attention layers, and how the two are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from attend_cases import BOUNDS, SINGLE
from cache_model import CacheModel, LayerModel, array
from one_layer import DIM, HEADS, QUERY_HEADS, Module, attention, found

from mixkvq import MixKVQCache
from mixkvq.layer import MixKVQLayer
from mixkvq.report import held_bytes


def as_view(x: torch.Tensor, style: int) -> torch.Tensor:
    """The same numbers as a model may hand them over: whole, heads behind tokens, part of something, spread out."""
    if style == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if style == 2:
        wide = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3), 7)
        wide[:, 1:, 1:-1, 2:-1] = x
        return wide[:, 1:, 1:-1, 2:-1]
    if style == 3:
        return x.repeat_interleave(2, 3)[..., ::2]
    return x


class Twins:
    """A cache, its model, and whether the cache has seen attention: one from a file must see it again."""

    def __init__(self, cache: MixKVQCache, model: CacheModel, *, seen: bool = False) -> None:
        self.cache, self.model, self.seen = cache, model, seen

    def step(
        self,
        generator: torch.Generator,
        dtype: torch.dtype,
        visible: np.ndarray,
        style: int = 0,
        change: Callable[[torch.Tensor], None] = lambda states: None,
        spoiled: np.ndarray | None = None,
    ) -> None:
        """One forward pass over as many new columns as ``visible`` bool [B, n] has.

        ``change`` is what happens to keys and to values before; attention is not checked for the heads that
        ``spoiled`` bool [B, H] names.
        """
        model, (batch, n) = self.model, visible.shape
        self.seen = True
        mask = model.extend(visible)
        for index, layer in enumerate(model.layers):
            q, k, v = (torch.randn(batch, heads, n, DIM, generator=generator) for heads in (QUERY_HEADS, HEADS, HEADS))
            k = k * torch.logspace(-1, 0.5, DIM) + torch.linspace(-2, 2, DIM)
            change(k), change(v)
            q, k, v = (as_view(x.to(dtype), style) for x in (q, k, v))
            was_packed, known, decodings = layer.packed, *self.proved(index)
            given = self.cache.update(k, v, index)
            stock = model.stock.update(k, v, index)
            layer.update(k, v)
            mask_ = torch.from_numpy(mask)
            with torch.no_grad():
                got = found(attention)(Module(), q, *given, mask_, scaling=DIM**-0.5, dropout=0.0)[0]
            assert not known or spoiled is not None or self.proved(index)[1] == decodings, "the kernel reads records"
            if was_packed:
                check_attention(got, q, layer, mask, self.cache.layers[index].precision, spoiled)
            else:
                assert all(map(same, given, stock))
                assert same(got, attention(Module(), q, *stock, mask_, scaling=DIM**-0.5)[0])
            layer.see(q, model.visible, got[:, -1].isfinite().flatten(1).all(1).numpy())

    def proved(self, index: int) -> tuple[bool, int]:
        """Whether the kernel may read a layer, and how often it was decoded."""
        layer = self.cache.layers[index] if index < len(self.cache.layers) else None
        return (False, 0) if layer is None else (layer.proof is not None, layer.dequantizations)

    def fill(self, generator: torch.Generator, dtype: torch.dtype, n: int) -> None:
        """Columns that no attention is computed for."""
        self.model.extend(np.ones((self.model.batch, n), bool))
        for index, layer in enumerate(self.model.layers):
            k, v = (torch.randn(self.model.batch, HEADS, n, DIM, generator=generator).to(dtype) for _ in "kv")
            for each in (self.cache, self.model.stock):
                each.update(k, v, index)
            layer.update(k, v)

    def check(self) -> None:
        """Everything is as the model says, bit for bit, and accounted for."""
        cache, model = self.cache, self.model
        assert cache.get_seq_length() == model.length == model.stock.get_seq_length()
        assert cache.get_mask_sizes(5, 0) == (model.length + 5, 0)
        assert len(cache.layers) in (len(model.layers), 0 if not model.length else len(model.layers))
        for index, layer in enumerate(cache.layers):
            check_layer(layer, model.layers[index], model.stock.layers[index] if model.length else None)
        check_report(cache, model)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the numbers are equal; NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.where(~a.isnan(), 0), b.where(~b.isnan(), 0))


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def check_attention(
    got: torch.Tensor,
    q: torch.Tensor,
    layer: LayerModel,
    mask: np.ndarray,
    precision: str,
    spoiled: np.ndarray | None,
) -> None:
    """Within the bound of float64 attention over what the model holds, or what the model's own function gives of it."""
    dense, group = layer.dense(), QUERY_HEADS // HEADS
    with np.errstate(all="ignore"):  # of spoiled heads
        wide = [q.double().numpy(), *(x.astype(np.float64).repeat(group, 1) for x in dense)]
        scores = np.where(mask, wide[0] @ wide[1].swapaxes(2, 3) * DIM**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(3, keepdims=True))  # NaN where nothing is seen
        want = weights @ wide[2] / weights.sum(3, keepdims=True)
        miss, size = (np.linalg.norm(x, axis=-1) for x in (got.transpose(1, 2).double().numpy() - want, want))
    rounding = 0 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps / 2
    checked = np.broadcast_to(mask.any(3), miss.shape)
    if spoiled is not None:
        checked = checked & ~spoiled.repeat(group, 1)[:, :, None]
    if (miss <= (SINGLE[precision] * BOUNDS[precision] + rounding) * size + 1e-7)[checked].all():
        return
    decoded = [torch.from_numpy(x).to(q.dtype) for x in dense]
    own = attention(Module(), q, *decoded, torch.from_numpy(mask), scaling=DIM**-0.5)[0]
    assert same(got, own), (miss / size)[checked].max()


def check_layer(layer: MixKVQLayer, model: LayerModel, stock: Any) -> None:
    """Bit for bit what the model holds."""
    assert layer.get_seq_length() == layer.length == model.length
    assert layer.get_mask_sizes(3) == (model.length + 3, 0)
    store, queries = layer.store, layer.queries
    assert (store is not None) == model.packed
    if model.sums is None or queries.sum is None:
        assert queries.sum is None or not queries.count.any()
        assert model.sums is None
    else:
        assert np.array_equal(queries.sum.numpy(), model.sums)
        assert queries.count.tolist() == model.counts.tolist()
    if not model.length:
        assert layer.tensors() == []
        return
    if store is None:
        assert all(np.array_equal(bits(array(a)), bits(b)) for a, b in zip(layer.states, model.plain, strict=True))
        return
    assert store.queries is queries and store.length == model.length and store.raised == model.raised
    for index, row in enumerate(model.rows):
        exact, blocks = int(store.exact[index]), int(store.blocks[index])
        assert (int(store.start[index]), exact) == (row.start, row.k.shape[1])
        for buffer, want in ((store.k, row.k), (store.v, row.v)):
            assert np.array_equal(bits(array(buffer[index, :, :exact])), bits(want))
        for h, head in enumerate(row.blocks):
            assert blocks == len(head)
            assert [store.record(index, h, j) for j in range(blocks)] == [record.data for record in head]
            if store.mu is not None:
                assert bool(store.has_mu[index, h]) == (row.mu[h] is not None)
                assert row.mu[h] is None or np.array_equal(store.mu[index, h].numpy(), row.mu[h])
    dense = [torch.from_numpy(x).to(store.k.dtype) for x in model.dense()]
    assert all(map(same, store.read(), dense))
    if model.config.allocate == "exact":
        for held, had in zip(dense, (stock.keys, stock.values), strict=True):
            for index, row in enumerate(model.rows):
                assert same(held[index, :, row.start :], had[index, :, row.start :])


def check_report(cache: MixKVQCache, model: CacheModel) -> None:
    """Every byte and every element is accounted for."""
    report, total = cache.report(), 0
    for told, layer, want in zip(report.layers, cache.layers, model.layers, strict=bool(model.length)):
        records = want.records()
        size = 2 * want.config.block_length * HEADS * DIM
        assert told.tokens == want.length
        assert told.record_bytes == sum(len(record.data) for record in records)
        assert told.record_elements == len(records) * size // HEADS
        assert told.exact_blocks == sum(record.exact for record in records)
        assert told.raised_scales == want.raised
        assert told.code_bytes + told.metadata_bytes <= told.record_bytes or not records
        if want.rows is not None:
            assert told.elements == sum(2 * row.k.size + size * len(row.blocks[0]) for row in want.rows)
            assert sum(slab.numel() for slab in layer.store.records.slabs) <= 2 * told.record_bytes
        elif want.plain is not None:
            assert told.elements == 2 * want.plain[0].size
        assert told.nbytes == held_bytes(layer.tensors())
        total += told.nbytes
    assert cache.ledger.total == report.nbytes == total <= report.peak_nbytes
    assert str(report)
