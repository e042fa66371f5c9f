"""A model of the cache to judge it by: the stock cache, and what a packed layer should hold, made by the oracle.

Only docs/format.md and these rules are behind it: rows count from their first real token, a row that has sinks and a
full window has its oldest block packed once attention has run, a block that is cut by a crop goes back decoded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from mixkvq import MixKVQConfig, reference
from mixkvq.reference import numbers

MIN_KEYS = 4  # attention over fewer proves nothing
_POWER = {"mean_abs": 1, "rms": 2}


def array(x: torch.Tensor) -> np.ndarray:
    """The same bits as the oracle takes them: bfloat16 as uint16."""
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@dataclasses.dataclass(eq=False)
class Record:
    """One record of the oracle, and what it decodes to, float32 [T, D]."""

    data: bytes
    k: np.ndarray
    v: np.ndarray

    @property
    def exact(self) -> bool:
        return reference.parse(self.data).exact


@dataclasses.dataclass(eq=False)
class Row:
    """One row of a packed layer: sinks and window in ``k`` and ``v`` [H, exact, D], and the blocks of every head."""

    start: int
    k: np.ndarray
    v: np.ndarray
    blocks: list[list[Record]]
    mu: list[np.ndarray | None]


class LayerModel:
    """What one layer should hold."""

    def __init__(self, config: MixKVQConfig, margin: int) -> None:
        self.config, self.margin = config, margin
        self.clear()

    def clear(self) -> None:
        self.rows: list[Row] | None = None
        self.plain: tuple[np.ndarray, np.ndarray] | None = None  # [B, H, N, D]
        self.sums: np.ndarray | None = None  # float64 [B, H, D]
        self.counts: np.ndarray | None = None
        self.dtype, self.length, self.raised = torch.float32, 0, 0

    @property
    def packed(self) -> bool:
        return self.rows is not None

    # ---- growing ----
    def update(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """New tokens; what was left to pack by an update without attention is packed first."""
        new, self.dtype = (array(k), array(v)), k.dtype
        self.length += k.shape[2]
        if self.rows is not None:
            self.flush(self.margin)
            for row, k_, v_ in zip(self.rows, *new, strict=True):
                row.k, row.v = np.concatenate([row.k, k_], 1), np.concatenate([row.v, v_], 1)
        else:
            held = self.plain or tuple(x[:, :, :0] for x in new)
            self.plain = tuple(np.concatenate(pair, 2) for pair in zip(held, new, strict=True))

    def see(self, q: torch.Tensor, visible: np.ndarray, finite: np.ndarray) -> None:
        """Attention has run: its queries [B, Q, n, D] count, what is due is packed.

        ``visible`` bool [B, N] says which columns attention may see, ``finite`` bool [B] whether the newest query of a
        row got numbers.
        """
        n = q.shape[2]
        starts = [0 if self.packed else _first(row) - (self.length - n) for row in visible]
        self._count(array(q), [min(max(at, 0), n) for at in starts])
        if self.rows is None:
            if not self._ready(visible, finite):
                return
            assert self.plain is not None
            self.rows = []
            for row, *states in zip(visible, *self.plain, strict=True):
                k, v = (x[:, _first(row) :] for x in states)
                self.rows.append(Row(_first(row), k, v, [[] for _ in k], [None] * len(k)))
            self.plain = None
        self.flush(self.margin)

    def _ready(self, visible: np.ndarray, finite: np.ndarray) -> bool:
        """Whether there is a block to pack, every row has a token, and a newest query tells how attention works."""
        first = [_first(row) for row in visible]
        threshold = self.config.sink_length + self.config.residual_length + self.margin
        proves = ((visible.sum(1) >= MIN_KEYS) & finite).any()
        return bool(max(first) < self.length and self.length - min(first) >= threshold and proves)

    def _count(self, q: np.ndarray, first: list[int]) -> None:
        power = _POWER.get(self.config.salience)
        if power is None:
            return
        states = self.plain[0] if self.plain is not None else np.stack([row.k for row in self.rows or ()][:1])
        heads = states.shape[1]
        if self.sums is None or self.counts is None:
            self.sums = np.zeros((len(q), heads, q.shape[3]))
            self.counts = np.zeros(len(q), np.int64)
        wide = numbers.widen(q, str(self.dtype).removeprefix("torch.")).astype(np.float64)
        term = np.abs(wide) if power == 1 else wide * wide
        for row, at in enumerate(first):
            for token in range(at, q.shape[2]):
                for head in term[row, :, token].reshape(heads, -1, q.shape[3]).swapaxes(0, 1):
                    self.sums[row] += head
            self.counts[row] += (q.shape[2] - at) * (q.shape[1] // heads)

    def flush(self, margin: int) -> None:
        """Pack every block that is due."""
        sink, length = self.config.sink_length, self.config.block_length
        for index, row in enumerate(self.rows or ()):
            while row.k.shape[1] >= sink + self.config.residual_length + margin:
                self._pack(index, row, slice(sink, sink + length))
                row.k, row.v = (np.delete(x, np.s_[sink : sink + length], 1) for x in (row.k, row.v))

    def _pack(self, index: int, row: Row, block: slice) -> None:
        codec = self.config.codec(row.k.shape[2], str(self.dtype).removeprefix("torch."))
        weights = None
        if self.sums is not None and self.counts is not None and self.counts.any():
            power = _POWER[self.config.salience]
            weights = reference.importance(self.sums[index], int(self.counts[index]), power)
        made, row.mu, raised = reference.pack_heads(codec, row.k[:, block], row.v[:, block], weights, row.mu)
        for head, (data,), mu in zip(row.blocks, made, row.mu, strict=True):
            head.append(Record(data, *reference.unpack(data, mu)))
        self.raised += sum(map(sum, raised))

    # ---- reading ----
    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values as attention should see them, float32 [B, H, N, D]; zeros at padding."""
        name, sink = str(self.dtype).removeprefix("torch."), self.config.sink_length
        if self.rows is None:
            assert self.plain is not None
            return numbers.widen(self.plain[0], name), numbers.widen(self.plain[1], name)
        out = []
        for which in ("k", "v"):
            rows = []
            for row in self.rows:
                exact = numbers.widen(getattr(row, which), name)
                parts = [np.zeros((exact.shape[0], row.start, exact.shape[2]), np.float32), exact[:, :sink]]
                for column in zip(*row.blocks, strict=True):
                    parts.append(np.stack([getattr(record, which) for record in column]))
                rows.append(np.concatenate([*parts, exact[:, sink:]], 1))
            out.append(np.stack(rows))
        return out[0], out[1]

    def records(self) -> list[Record]:
        """All records, those that rows share once."""
        every = {id(record): record for row in self.rows or () for head in row.blocks for record in head}
        return list(every.values())

    # ---- shortening and moving ----
    def crop(self, remove: int) -> None:
        keep = max(self.length - remove, 0)
        if keep == 0:
            if remove and self.length:
                self.clear()
        elif self.rows is None:
            assert self.plain is not None
            self.plain = (self.plain[0][:, :, :keep], self.plain[1][:, :, :keep])
            self.length = keep
        else:
            for row in self.rows:
                self._crop(row, keep)
            self.length = keep
        if self.margin:  # the rollback that was expected
            self.flush(0)

    def _crop(self, row: Row, keep: int) -> None:
        sink, length = self.config.sink_length, self.config.block_length
        name = str(self.dtype).removeprefix("torch.")
        tokens, row.start = max(keep - row.start, 0), min(row.start, keep)
        blocks = min(max(tokens - sink, 0) // length, len(row.blocks[0]))
        if blocks == len(row.blocks[0]):
            exact = tokens - blocks * length
            row.k, row.v = row.k[:, :exact], row.v[:, :exact]
        else:  # the window goes, and the part of the cut block comes back
            part = max(tokens - sink - blocks * length, 0)
            for which in ("k", "v"):
                cut = np.stack([getattr(head[blocks], which)[:part] for head in row.blocks])
                sinks = getattr(row, which)[:, : min(sink, tokens)]
                setattr(row, which, np.concatenate([sinks, numbers.narrow(cut, name)], 1))
            row.blocks = [head[:blocks] for head in row.blocks]
        for h, head in enumerate(row.blocks):
            if all(record.exact for record in head):
                row.mu[h] = None

    def gather(self, rows: list[int]) -> None:
        if not self.length:
            return
        if self.rows is None:
            assert self.plain is not None
            self.plain = (self.plain[0][rows], self.plain[1][rows])
        else:
            have = self.rows
            self.rows = [
                dataclasses.replace(have[r], blocks=[list(head) for head in have[r].blocks], mu=list(have[r].mu))
                for r in rows
            ]
        if self.sums is not None and self.counts is not None:
            self.sums, self.counts = self.sums[rows], self.counts[rows]


def _first(visible: np.ndarray) -> int:
    """First column that may be seen, the number of columns if there is none."""
    return int(visible.argmax()) if visible.any() else len(visible)


class CacheModel:
    """What a cache should hold: its layers, the stock cache with the same history, and the mask of its user."""

    def __init__(self, config: MixKVQConfig, layers: int, margin: int = 0) -> None:
        self.layers = [LayerModel(config, margin) for _ in range(layers)]
        self.clear()

    def clear(self) -> None:
        for layer in self.layers:
            layer.clear()
        self.stock = DynamicCache()
        self.visible = np.zeros((0, 0), bool)  # [B, N]

    @property
    def length(self) -> int:
        return self.visible.shape[1]

    @property
    def batch(self) -> int:
        """0 for an empty cache, whose next tokens may have any."""
        return self.visible.shape[0] if self.length else 0

    def extend(self, visible: np.ndarray) -> np.ndarray:
        """Columns more, [B, n]; the mask of their queries, bool [B, 1, n, N]."""
        had = self.visible if self.length else np.zeros((len(visible), 0), bool)
        self.visible = np.concatenate([had, visible], 1)
        n, columns = visible.shape[1], self.length
        causal = np.arange(columns) <= np.arange(columns - n, columns)[:, None]
        return self.visible[:, None, None] & causal

    def crop(self, remove: int) -> None:
        for layer in self.layers:
            layer.crop(remove)
        self.stock.crop(-remove)
        self.visible = self.visible[:, : max(self.length - remove, 0)]
        if not self.length:
            self.stock = DynamicCache()  # which takes no other batch now, ours does

    def gather(self, rows: list[int], stock: Any) -> None:
        for layer in self.layers:
            layer.gather(rows)
        stock(self.stock)
        if self.length:
            self.visible = self.visible[rows]
