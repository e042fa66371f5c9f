"""`RecordTable`: the packed records of a layer and where they lie.

Records are immutable and live in slabs (uint8 tensors) that are written once, at their exact size, and never copied to
grow. A table says where record (row, head, block) is, as ``slab << 40 | offset``, so rows are reordered, selected and
repeated by moving entries: rows with the same history share its records.

The table is on the CPU wherever the slabs are: on a CUDA device, or in pinned host memory, which a device reads over
the bus. Kernels there get a second table, of addresses, made from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch

from . import operators
from .autograd import OrdinaryCopies, outside_autograd
from .guard import lacks_memory
from .sending import SentAsCopy

SHIFT = 40
OFFSET = (1 << SHIFT) - 1
ALIGNMENT = 64
_KIND, _NBYTES = 5, 20  # where the record header has its kind and length, docs/format.md section 1
_ROOM = 16  # columns that a table of addresses is made longer by, at least


class RecordTable(OrdinaryCopies, SentAsCopy):
    """Records of ``batch`` rows and ``heads`` heads.

    Parameters
    ----------
    batch, heads : int
    device : torch.device
        Of the kernels that read the records.
    offload : bool
        Whether records for a CUDA device are in pinned host memory.

    Attributes
    ----------
    slabs : list of uint8 tensors
    place : int64 tensor [B, H, blocks of the longest row]
        -1 where a row has no such block.
    blocks : int64 tensor [B]
    """

    def __init__(self, batch: int, heads: int, device: torch.device, *, offload: bool = False) -> None:
        self._readers = _Readers.of(device, offload)  # before the slabs: Python lets go of attributes in this order
        self.device = device
        self.slabs: list[torch.Tensor] = []
        self._widths: list[int] = []  # bytes of a record of each slab, 0 where they differ
        self._longest: list[int] = []  # bytes of the longest record of each slab
        self.place = torch.zeros(batch, heads, 0, dtype=torch.int64, device="cpu")
        self.blocks = torch.zeros(batch, dtype=torch.int64, device="cpu")
        self._addresses: tuple[torch.Tensor, torch.Tensor] | None = None
        self._fresh = False  # whether the addresses are those of the records

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_addresses": None, "_fresh": False}

    @outside_autograd
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # records must be on 64-byte boundaries, which not every way of loading a tensor gives; copies are not pinned
        self.slabs = [slab if self._usable(slab) else self._copied(slab) for slab in self.slabs]

    @property
    def pinned(self) -> bool:
        """Whether records are in pinned host memory."""
        return self._readers is not None

    def _usable(self, slab: torch.Tensor) -> bool:
        return slab.data_ptr() % ALIGNMENT == 0 and (not self.pinned or slab.is_pinned())

    def _copied(self, slab: torch.Tensor) -> torch.Tensor:
        return self._memory(slab.numel()).copy_(slab)

    def _memory(self, nbytes: int) -> torch.Tensor:
        """A new slab."""
        if self.pinned:
            return pinned_memory(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @outside_autograd
    def move(self, device: torch.device, *, offload: bool = False) -> None:
        """Have the records read on another device, from its memory or from pinned host memory."""
        self._readers, self.device = _Readers.of(device, offload), device
        self.slabs = [self._copied(slab) for slab in self.slabs]
        self._addresses, self._fresh = None, False

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
        slab = self._memory(total)
        self._widths.append(_copy_records(slab, staging.flatten(0, 2), lengths))
        self._longest.append(max(lengths))
        self.slabs.append(slab)
        self._fresh = False
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

    def mark(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Where the table ends now, for `rewind`."""
        return self.place, self.blocks, len(self.slabs)

    def rewind(self, mark: tuple[torch.Tensor, torch.Tensor, int]) -> None:
        """Undo every `add` since then; needs no memory."""
        self.place, self.blocks, slabs = mark
        for of_slabs in (self.slabs, self._widths, self._longest):
            del of_slabs[slabs:]
        self._fresh = False

    # ---- shrinking and moving --------------------------------------------------------------------------------------
    def truncate(self, blocks: torch.Tensor) -> None:
        """Keep the first ``blocks[b]`` blocks of every row."""
        blocks = blocks.to(self.blocks.device)
        longest = int(blocks.max()) if len(blocks) else 0
        column = torch.arange(longest, device=blocks.device)
        place = self.place[:, :, :longest]
        self.place, self.blocks = torch.where(column < blocks.view(-1, 1, 1), place, -1), blocks.clone()
        self._sweep()

    def gather(self, rows: torch.Tensor) -> None:
        """Keep these batch rows, in this order; a row may come several times."""
        rows = rows.to(self.blocks.device)
        blocks = self.blocks.index_select(0, rows)
        longest = int(blocks.max()) if len(blocks) else 0
        self.place, self.blocks = self.place.index_select(0, rows)[:, :, :longest].contiguous(), blocks
        self._sweep()

    def _sweep(self) -> None:
        """Drop slabs without a live record; rewrite those in which less than half of the bytes are live."""
        self._fresh = False
        if self._readers:
            self._readers.wait()
        live, sizes = self.distinct()
        slab_of = live >> SHIFT
        used = torch.zeros(len(self.slabs), dtype=torch.int64, device=live.device).index_add(0, slab_of, sizes).tolist()
        if all(2 * n >= slab.numel() for n, slab in zip(used, self.slabs, strict=True)):
            return
        moved, slabs, widths, longest = live.clone(), list[torch.Tensor](), list[int](), list[int]()
        for index, (slab, nbytes) in enumerate(zip(self.slabs, used, strict=True)):
            if nbytes == 0:
                continue
            here = slab_of == index
            offsets = live[here] & OFFSET
            if 2 * nbytes < slab.numel():
                lengths = sizes[here]
                parts = [slab[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
                try:
                    slab, offsets = torch.cat(parts, out=self._memory(nbytes)), lengths.cumsum(0) - lengths
                except Exception as error:  # the slab is as good as it is
                    if not lacks_memory(error):
                        raise
            moved[here] = (len(slabs) << SHIFT) + offsets
            slabs.append(slab)
            widths.append(self._widths[index])
            longest.append(self._longest[index])
        place, filled = self.place.clone(), self.place >= 0
        place[filled] = moved[torch.searchsorted(live, place[filled])]
        self.place, self.slabs, self._widths, self._longest = place, slabs, widths, longest

    # ---- files -----------------------------------------------------------------------------------------------------
    def layout(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How one slab holds all live records, in the order of the table, without gaps.

        Returns
        -------
        place : int64 tensor [B, H, blocks of the longest row]
            Where each record lies then, -1 where a row has no such block.
        source : int64 tensor [records]
            Where each lies now, in the new order.
        sizes : int64 tensor [records]
        """
        live, sizes = self.distinct()
        filled = self.place >= 0
        index = torch.searchsorted(live, self.place[filled])
        first = torch.full_like(live, len(index)).scatter_reduce(
            0, index, torch.arange(len(index), device=index.device), "amin"
        )
        order = first.argsort()
        source, sizes = live[order], sizes[order]
        offsets = torch.empty_like(live)
        offsets[order] = sizes.cumsum(0) - sizes
        place = torch.full_like(self.place, -1)
        place[filled] = offsets[index]
        return place, source, sizes

    def gathered(self, source: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """The slab of `layout`."""
        slab = torch.empty(int(sizes.sum()), dtype=torch.uint8, device="cpu")
        to, slabs, end = slab.numpy(), [slab.numpy(force=True) for slab in self.slabs], 0
        for place, size in zip(source.tolist(), sizes.tolist(), strict=True):
            begin, end, at = end, end + size, place & OFFSET
            to[begin:end] = slabs[place >> SHIFT][at : at + size]
        return slab

    @classmethod
    def restored(cls, slab: torch.Tensor, place: torch.Tensor, blocks: torch.Tensor, widths: set[int]) -> RecordTable:
        """A table over one slab on the CPU, as `layout` describes it; ``widths`` are the lengths that records have."""
        batch, heads, _ = place.shape
        self = cls(batch, heads, place.device)
        if slab.numel():
            self.slabs, self._longest = [slab], [max(widths)]
            self._widths = [self._longest[0] if len(widths) == 1 else 0]
        self.place, self.blocks = place, blocks
        return self

    # ---- reading ---------------------------------------------------------------------------------------------------
    def distinct(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of all live records, each once, ascending; and their lengths."""
        live = torch.unique(self.place[self.place >= 0])
        slab_of = live >> SHIFT
        sizes = torch.tensor(self._widths, dtype=torch.int64, device=live.device)[slab_of]
        for index, (slab, width) in enumerate(zip(self.slabs, self._widths, strict=True)):
            if width == 0:
                here = slab_of == index
                offsets = ((live[here] & OFFSET) + _NBYTES) // 4
                sizes[here] = slab.view(torch.int32)[offsets.to(slab.device)].to(sizes)
        return live, sizes

    def any_coded(self) -> torch.Tensor:
        """bool [B, H]: whether a head has a coded record."""
        coded = torch.zeros_like(self.place, dtype=torch.bool)
        for index, slab in enumerate(self.slabs):
            here = (self.place >= 0) & (self.place >> SHIFT == index)
            offsets = (self.place[here] & OFFSET) + _KIND
            coded[here] = (slab[offsets.to(slab.device)] == 0).to(coded.device)
        return coded.any(-1)

    def record(self, row: int, head: int, block: int) -> bytes:
        """The bytes of one record."""
        return self._bytes(int(self.place[row, head, block]))

    def _bytes(self, place: int) -> bytes:
        return _bytes(self.slabs[place >> SHIFT], place & OFFSET)

    def records(self) -> Iterator[bytes]:
        """All live records, each once; slabs are copied to the CPU one by one."""
        index, slab = -1, torch.empty(0, device="cpu")
        for place in self.distinct()[0].tolist():
            if place >> SHIFT != index:
                index = place >> SHIFT
                slab = self.slabs[index].cpu()
            yield _bytes(slab, place & OFFSET)

    # ---- for kernels on CUDA devices -------------------------------------------------------------------------------
    @property
    def longest(self) -> int:
        """Bytes of the longest record; 0 if there is none."""
        return max(self._longest, default=0)

    @outside_autograd
    def addresses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where records are in memory, and how many, for kernels on the device.

        The tensors stay the same while their room lasts, so that CUDA graphs may read them: a quarter more than needed.

        Returns
        -------
        addresses : int64 tensor [B, H, capacity]
            0 where there is no record.
        blocks : int64 tensor [B]
        """
        batch, heads, most = self.place.shape
        held = self._addresses
        if held is None or held[0].shape[:2] != (batch, heads) or held[0].shape[2] < most:
            room = -(-(most + most // 4) // _ROOM) * _ROOM if most else _ROOM
            self._fresh = False
            held = self._addresses = (
                torch.zeros(batch, heads, room, dtype=torch.int64, device=self.device),
                torch.zeros(batch, dtype=torch.int64, device=self.device),
            )
        if not self._fresh:
            held[0].copy_(operators.addresses(self.slabs, self.place, held[0].shape[2]))
            held[1].copy_(self.blocks)
            self._fresh = True
        return held

    @property
    def host_bytes(self) -> int:
        """Bytes of records in pinned host memory."""
        return sum(slab.numel() for slab in self.slabs) if self.pinned else 0

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""
        return [self.place, self.blocks, *self.slabs, *(self._addresses or ())]


class _Readers:
    """The kernels that may still read pinned slabs when these are let go and others will write to the memory next.

    An object of its own, so that tables without such slabs have no `__del__`: Python ignores a Ctrl-C that comes there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def of(cls, device: torch.device, offload: bool) -> _Readers | None:
        return cls(device) if offload and device.type == "cuda" else None

    def wait(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)

    __del__ = wait


def pinned_memory(nbytes: int) -> torch.Tensor:
    """Host memory that CUDA devices read at its own address."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _bytes(slab: torch.Tensor, offset: int) -> bytes:
    """The record there."""
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
    if not slots.is_cpu:  # few launches: the bytes in use of all slots, which are whole words
        words, sizes = slots.view(torch.int64), torch.tensor(lengths, device=slots.device).view(-1, 1)
        slab.view(torch.int64).copy_(words[8 * torch.arange(words.shape[1], device=slots.device) < sizes])
        return 0
    offset = 0
    for slot, length in zip(slots, lengths, strict=True):
        slab[offset : offset + length] = slot[:length]
        offset += length
    return 0
