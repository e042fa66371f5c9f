"""Packed histories of any length: a few blocks are packed, their records written again and again.

Every copy of a record has memory of its own, in slabs laid out as the cache lays them out; only the contents repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..config import MixKVQConfig
from ..slabs import RecordTable
from ..store import SLAB_COLUMNS
from .samples import Sampler


@dataclass(frozen=True)
class History:
    """One packed history of a layer.

    Attributes
    ----------
    layer : ops.Handle
    tokens : int
    nbytes : int
        Bytes of the records and the exact window.
    """

    layer: ops.Handle
    tokens: int
    nbytes: int

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and values, float32 [1, H, N, D]."""
        t = self.layer.tensors
        exact = int(t.exact[0])
        packed = self.tokens - exact
        sinks = min(t.sink_length, exact)
        shape = (1, t.k.shape[1], self.tokens, t.k.shape[3])
        k, v = torch.zeros(shape), torch.zeros(shape)
        ops.unpack(self.layer, k, v, torch.tensor([sinks]))
        for whole, window in ((k, t.k), (v, t.v)):
            whole[:, :, :sinks] = window[:, :, :sinks]
            whole[:, :, sinks + packed :] = window[:, :, sinks:exact]
        return k, v


@dataclass(frozen=True)
class Records:
    """Packed blocks to build histories from. Make it with `pack`."""

    config: MixKVQConfig
    staging: Tensor
    """uint8 [1, H, m, bound]"""
    sizes: Tensor
    """int64 [1, H, m]"""
    mu: Tensor | None
    k: Tensor
    """float32 [1, H, n, D], for exact windows"""
    v: Tensor

    @classmethod
    def pack(cls, config: MixKVQConfig, sampler: Sampler, blocks: int = SLAB_COLUMNS) -> Records:
        """Pack this many blocks of every head, float32."""
        codec, heads, dim = config.codec(sampler.head_dim, "float32"), sampler.heads, sampler.head_dim
        window = config.sink_length + config.residual_length
        k, v = sampler.states(max(blocks * config.block_length, window))
        mu = has_mu = None
        if codec.key_reference and codec.allocate != "exact":
            mu, has_mu = torch.zeros(1, heads, dim, dtype=torch.float16), torch.zeros(1, heads, dtype=torch.uint8)
        first, count = torch.zeros(1, dtype=torch.int64), torch.tensor([blocks])
        importance = sampler.importance() if config.salience != "none" else None
        staging, sizes, _ = ops.pack(codec, k, v, first, count, blocks, importance, mu, has_mu)
        return cls(config, staging, sizes, mu, k[:, :, :window].clone(), v[:, :, :window].clone())

    def history(self, tokens: int) -> History:
        """A history as a cache holds it after ``tokens`` tokens: sinks, all blocks that are due, window."""
        config, heads = self.config, self.staging.shape[1]
        behind = tokens - config.sink_length - config.residual_length
        blocks = behind // config.block_length + 1 if behind >= 0 else 0
        table = RecordTable(1, heads, self.staging.device)
        for column in range(0, blocks, self.staging.shape[2]):
            count = min(self.staging.shape[2], blocks - column)
            part = slice(None), slice(None), slice(0, count)
            table.add(self.staging[part], self.sizes[part], [count])
        exact = tokens - blocks * config.block_length
        k, v = self.k.clone(), self.v.clone()
        place, counts = table.place.contiguous(), table.blocks
        layer = ops.layer(k, v, torch.tensor([exact]), None, config.sink_length, table.slabs, place, counts, self.mu)
        records = sum(slab.numel() for slab in table.slabs)
        return History(layer, tokens, records + 2 * heads * exact * k.shape[3] * k.element_size())
