"""Keys, values and queries made on the device, and packed histories of them.

Channels are of unequal width and offset, as a model's are. Nothing is repeated: every record has bytes of its own, so
that nothing is read from a cache that a real history would have to read from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq import MixKVQConfig, ops
from mixkvq.states import codec_of
from mixkvq.store import PackedStore

HEADS = 8
"""KV heads."""


def _channels(batch: int, heads: int, dim: int, spread: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(batch, heads, 1, dim, generator=generator, device=generator.device)
    return torch.exp(spread * noise)


def states(
    batch: int,
    tokens: int,
    dim: int,
    device: str,
    heads: int = HEADS,
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, N, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    k, v = (torch.empty(batch, heads, tokens, dim, dtype=dtype, device=device) for _ in range(2))
    width = 0.7 * _channels(batch, heads, dim, 0.6, generator)
    middle = _channels(batch, heads, dim, 0.5, generator)
    for row in range(batch):  # row by row: float32 noise of all would take twice the memory of what is made
        shape = heads, tokens, dim
        k[row] = torch.randn(shape, generator=generator, device=device) * width[row] + middle[row]
        v[row] = torch.randn(shape, generator=generator, device=device)
    return k, v


def queries(
    batch: int, group: int, dim: int, device: str, heads: int = HEADS, n: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Queries [B, H * G, n, D]."""
    generator = torch.Generator(device).manual_seed(17 + group)
    q = torch.randn(batch, heads, group, n, dim, generator=generator, device=device)
    q = q * _channels(batch, heads, dim, 0.6, generator)[:, :, None]
    return q.reshape(batch, heads * group, n, dim).to(dtype)


@dataclass(frozen=True)
class Packed:
    """A packed history of one layer.

    Attributes
    ----------
    store : PackedStore
    nbytes : int
        Of records and exact window: what a step has to read.
    record_bytes : int
        Of records alone.
    """

    store: PackedStore
    nbytes: int
    record_bytes: int

    @classmethod
    def of(cls, preset: str, k: Tensor, v: Tensor) -> Packed:
        """Pack all due blocks of keys and values [B, H, N, D]."""
        config = MixKVQConfig.preset(preset)
        start = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        store = PackedStore.begin(config, codec_of(config, k, v), k, v, start)
        records = sum(slab.numel() for slab in store.records.slabs)
        window = 2 * int(store.exact.sum()) * k.shape[1] * k.shape[3] * k.element_size()
        return cls(store, records + window, records)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and values, float32 [B, H, N, D]."""
        store = self.store
        shape = (*store.k.shape[:2], store.length, store.k.shape[3])
        k, v = (torch.zeros(shape, device=store.k.device) for _ in range(2))
        sinks = store.exact.clamp(max=store.config.sink_length)
        ops.unpack(store.core(), k, v, sinks)
        for row, (s, n) in enumerate(zip(sinks.tolist(), store.exact.tolist(), strict=True)):
            packed = store.length - n
            for whole, window in ((k, store.k), (v, store.v)):
                whole[row, :, :s] = window[row, :, :s]
                whole[row, :, s + packed :] = window[row, :, s:n]
        return k, v


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 attention of q [B, Q, 1, D] over k, v [B, H, N, D]: [B, 1, Q, D], head by head."""
    batch, heads, _, dim = k.shape
    grouped = q.double().reshape(batch, heads, -1, dim)
    out = torch.empty_like(grouped)
    for b in range(batch):
        for h in range(heads):
            scores = grouped[b, h] @ k[b, h].double().T * dim**-0.5
            out[b, h] = scores.softmax(-1) @ v[b, h].double()
    return out.reshape(batch, 1, -1, dim)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error of the worst query head of [B, 1, Q, D]."""
    return float(((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max())
