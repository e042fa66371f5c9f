"""`RecordTable`: the packed records of a layer and where they lie.

Records are immutable and live in slabs (uint8 tensors) that are written once, at their exact size, and never copied to
grow. A table says where record (row, head, block) is, as ``slab << 40 | offset``, so rows are reordered, selected and
repeated by moving entries: rows with the same history share its records.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch

from .autograd import OrdinaryCopies, outside_autograd

SHIFT = 40
OFFSET = (1 << SHIFT) - 1
ALIGNMENT = 64
_KIND, _NBYTES = 5, 20  # where the record header has its kind and length, docs/format.md section 1


class RecordTable(OrdinaryCopies):
    """Records of ``batch`` rows and ``heads`` heads.

    Attributes
    ----------
    slabs : list of uint8 tensors
    place : int64 tensor [B, H, blocks of the longest row]
        -1 where a row has no such block.
    blocks : int64 tensor [B]
    """

    def __init__(self, batch: int, heads: int, device: torch.device) -> None:
        self.slabs: list[torch.Tensor] = []
        self._widths: list[int] = []  # bytes of a record of each slab, 0 where they differ
        self.place = torch.zeros(batch, heads, 0, dtype=torch.int64, device=device)
        self.blocks = torch.zeros(batch, dtype=torch.int64, device=device)

    @outside_autograd
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # kernels need records on 64-byte boundaries, which not every way of loading a tensor gives
        self.slabs = [slab if slab.data_ptr() % ALIGNMENT == 0 else slab.clone() for slab in self.slabs]

    # ---- growing ---------------------------------------------------------------------------------------------------
    def add(self, staging: torch.Tensor, sizes: torch.Tensor, counts: list[int]) -> None:
        """Append newly packed blocks to every row.

        Parameters
        ----------
        staging : uint8 tensor [B, H, m, bound]
            Records, each at the start of its slot.
        sizes : int64 tensor [B, H, m]
            Their lengths, 0 where ``j >= counts[b]``.
        counts : list of int
            New blocks of each row.
        """
        lengths: list[int] = sizes.flatten().tolist()
        first = len(self.slabs) << SHIFT
        *places, end = accumulate(lengths, initial=first)
        total = end - first
        if total == 0:
            return
        slab = torch.empty(total, dtype=torch.uint8, device=staging.device)
        self._widths.append(_copy_records(slab, staging.flatten(0, 2), lengths))
        self.slabs.append(slab)
        old, have, device = self.place, self.blocks.tolist(), self.place.device
        new = torch.tensor(places, device=device).view_as(sizes)
        if len(set(have)) == len(set(counts)) == 1:  # no row is longer
            self.place = torch.cat([old, new[:, :, : counts[0]]], 2)
        else:
            longest = max(a + b for a, b in zip(have, counts, strict=True))
            self.place = torch.full((*old.shape[:2], longest), -1, dtype=torch.int64, device=device)
            self.place[:, :, : old.shape[2]] = old
            for row, (a, b) in enumerate(zip(have, counts, strict=True)):
                self.place[row, :, a : a + b] = new[row, :, :b]
        self.blocks = self.blocks + torch.tensor(counts, device=device)

    # ---- shrinking and moving --------------------------------------------------------------------------------------
    def truncate(self, blocks: torch.Tensor) -> None:
        """Keep the first ``blocks[b]`` blocks of every row."""
        longest = int(blocks.max()) if len(blocks) else 0
        column = torch.arange(longest, device=blocks.device)
        place = self.place[:, :, :longest]
        self.place = torch.where(column < blocks.view(-1, 1, 1), place, -1)
        self.blocks = blocks.clone()
        self._sweep()

    def gather(self, rows: torch.Tensor) -> None:
        """Keep these batch rows, in this order; a row may come several times."""
        self.blocks = self.blocks.index_select(0, rows)
        longest = int(self.blocks.max()) if len(self.blocks) else 0
        self.place = self.place.index_select(0, rows)[:, :, :longest].contiguous()
        self._sweep()

    def _sweep(self) -> None:
        """Drop slabs without a live record; rewrite those in which less than half of the bytes are live."""
        live, sizes = self.distinct()
        slab_of = live >> SHIFT
        used = torch.zeros(len(self.slabs), dtype=torch.int64, device=live.device).index_add(0, slab_of, sizes).tolist()
        if all(2 * n >= slab.numel() for n, slab in zip(used, self.slabs, strict=True)):
            return
        moved, slabs, widths = live.clone(), list[torch.Tensor](), list[int]()
        for index, (slab, nbytes) in enumerate(zip(self.slabs, used, strict=True)):
            if nbytes == 0:
                continue
            here = slab_of == index
            offsets = live[here] & OFFSET
            if 2 * nbytes < slab.numel():
                lengths = sizes[here]
                parts = [slab[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
                slab, offsets = torch.cat(parts), lengths.cumsum(0) - lengths
            moved[here] = (len(slabs) << SHIFT) + offsets
            slabs.append(slab)
            widths.append(self._widths[index])
        filled = self.place >= 0
        self.place[filled] = moved[torch.searchsorted(live, self.place[filled])]
        self.slabs, self._widths = slabs, widths

    # ---- reading ---------------------------------------------------------------------------------------------------
    def distinct(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of all live records, each once, ascending; and their lengths."""
        live = torch.unique(self.place[self.place >= 0])
        slab_of = live >> SHIFT
        sizes = torch.tensor(self._widths, dtype=torch.int64, device=live.device)[slab_of]
        for index, (slab, width) in enumerate(zip(self.slabs, self._widths, strict=True)):
            if width == 0:
                here = slab_of == index
                offsets = (live[here] & OFFSET) + _NBYTES
                sizes[here] = slab.view(torch.int32)[offsets // 4].to(torch.int64)
        return live, sizes

    def any_coded(self) -> torch.Tensor:
        """bool [B, H]: whether a head has a coded record."""
        coded = torch.zeros_like(self.place, dtype=torch.bool)
        for index, slab in enumerate(self.slabs):
            here = (self.place >= 0) & (self.place >> SHIFT == index)
            coded[here] = slab[(self.place[here] & OFFSET) + _KIND] == 0
        return coded.any(-1)

    def record(self, row: int, head: int, block: int) -> bytes:
        """The bytes of one record."""
        return self._bytes(int(self.place[row, head, block]))

    def records(self) -> Iterator[bytes]:
        """All live records, each once."""
        for place in self.distinct()[0].tolist():
            yield self._bytes(place)

    def _bytes(self, place: int) -> bytes:
        slab, offset = self.slabs[place >> SHIFT], place & OFFSET
        length = int(slab[offset + _NBYTES : offset + _NBYTES + 4].view(torch.int32))
        return slab[offset : offset + length].numpy(force=True).tobytes()


def _copy_records(slab: torch.Tensor, slots: torch.Tensor, lengths: list[int]) -> int:
    """Write the records at the start of ``slots`` one behind the other; slots of length 0 are empty.

    Returns
    -------
    int
        The length of the records if it is the same for all, else 0.
    """
    width, *others = {n for n in lengths if n}
    if not others:  # the usual case: one record size per preset
        used = slots[:, :width]
        filled = lengths.count(width)
        if filled < len(lengths):
            used = used[[n > 0 for n in lengths]]
        slab.view(filled, width).copy_(used)
        return width
    offset = 0
    for slot, length in zip(slots, lengths, strict=True):
        slab[offset : offset + length] = slot[:length]
        offset += length
    return 0
