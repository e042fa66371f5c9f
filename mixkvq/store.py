"""`PackedStore`: the packed history and the exact window of one layer, as plain tensors; nothing of transformers.

The tokens of batch row b, counted from its first real token (column ``start[b]``; padding before it is not stored), are

    sinks | packed blocks of T tokens | window

Sinks and window lie in one exact buffer, ``exact[b]`` tokens, sinks first. While a window holds at least
``residual_length`` tokens its oldest block is packed. Every row has its own start, window and number of blocks, so a
row gives the same records alone and in a padded batch.
"""

from __future__ import annotations

from typing import Any

import torch

from . import operators, ops
from .autograd import OrdinaryCopies, outside_autograd
from .config import BlockCodec, MixKVQConfig
from .operators import DeviceLayer, LayerTensors
from .placement import Placement
from .queries import QueryStatistics
from .sending import SentAsCopy
from .slabs import RecordTable
from .totals import StoreTotals, count

STAGING_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # a GPU must have many blocks to pack at once
SLAB_COLUMNS = 16  # block columns (one block of every row and head) per slab, at most, on the CPU
GROWTH = 64  # exact buffers grow to a multiple of this, and shrink back when they are flushed


def columns_at_once(column_bytes: int, device: str = "cpu") -> int:
    """Block columns that are packed at a time, if the records of one take up to so many bytes."""
    columns = STAGING_BYTES.get(device, 0) // column_bytes
    return max(1, min(SLAB_COLUMNS, columns) if device == "cpu" else columns)


class PackedStore(OrdinaryCopies, SentAsCopy):
    """State of one packed layer. Make it with `begin`.

    Parameters
    ----------
    config : MixKVQConfig
    codec : BlockCodec
        ``config`` for this layer's head_dim and dtype.
    start : int64 tensor [B]
        Column of the first real token of every row.
    heads : int
        KV heads, H.
    dtype : torch.dtype
        Of keys and values.
    margin : int
        As in `flush`.
    queries : QueryStatistics, optional
        Of all queries so far.
    placement : Placement, optional
        Of the cache, whose layers run one after the other.

    Attributes
    ----------
    k, v : tensor [B, H, C, D]
        Exact buffers.
    exact : int64 tensor [B]
        Tokens in use of the buffers, per row.
    records : RecordTable
    mu, has_mu : float16 tensor [B, H, D] and uint8 tensor [B, H], or None
        Key references (docs/format.md section 4).
    queries : QueryStatistics
    raised : int
        Raised scales in all blocks packed so far.
    passing : int
        Most bytes held besides `nbytes` while something was packed or moved; for the caller to read and set to 0.
    length : int
        Columns seen, padding included.
    padding : int
        Largest start: columns below it are hidden from some row for good.
    torn : bool
        Whether a change is under way that cannot be undone, or broke off: see `guard`.
    """

    torn = False
    _exact: list[int]
    _room: int
    _slack: int

    @outside_autograd
    def __init__(
        self,
        config: MixKVQConfig,
        codec: BlockCodec,
        start: torch.Tensor,
        heads: int,
        dtype: torch.dtype,
        margin: int = 0,
        queries: QueryStatistics | None = None,
        placement: Placement | None = None,
    ) -> None:
        batch, device = len(start), start.device
        self.config, self.codec, self.start = config, codec, start.clone()
        self._record_bound = ops.codec(codec).record_bound
        self.k = torch.zeros(batch, heads, config.exact_capacity(margin), codec.head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.exact = torch.zeros(batch, dtype=torch.int64, device=device)
        self.placement = placement or Placement()
        self.records = RecordTable(batch, heads, device, offload=self.placement.offload)
        self.mu: torch.Tensor | None = None
        self.has_mu: torch.Tensor | None = None
        if codec.key_reference and codec.allocate != "exact":
            self.mu = torch.zeros(batch, heads, codec.head_dim, dtype=torch.float16, device=device)
            self.has_mu = torch.zeros(batch, heads, dtype=torch.uint8, device=device)
        self.queries = queries or QueryStatistics(config.salience)
        self.queries.allocate(batch, heads, codec.head_dim, device)
        self.raised = self.length = self.passing = 0
        self._handle: Any = None
        self._recount()

    @classmethod
    @outside_autograd
    def begin(
        cls,
        config: MixKVQConfig,
        codec: BlockCodec,
        k: torch.Tensor,
        v: torch.Tensor,
        start: torch.Tensor,
        queries: QueryStatistics | None = None,
        margin: int = 0,
        placement: Placement | None = None,
    ) -> PackedStore:
        """Take over the plain keys and values of a prompt: due blocks are packed where they lie, the rest is copied.

        Parameters
        ----------
        config, codec, placement
            As in the class.
        k, v : tensor [B, H, N, D]
            Any strides; not kept.
        start : int64 tensor [B]
            Column of the first real token of every row, 0 to N.
        queries : QueryStatistics, optional
            Of all queries so far.
        margin : int
            As in `flush`.

        Returns
        -------
        PackedStore
        """
        k, v = k.detach(), v.detach()
        self = cls(config, codec, start, k.shape[1], k.dtype, margin, queries, placement)
        self.length = k.shape[2]
        rows = []
        for at in start.tolist():
            tokens = self.length - at
            sinks, blocks = min(tokens, config.sink_length), config.due_blocks(tokens, margin)
            rows.append((at, sinks, tokens - blocks * config.block_length, blocks))
        self._pack(k, v, [at + sinks for at, sinks, _, _ in rows], [blocks for *_, blocks in rows])
        for row, (at, s, n, blocks) in enumerate(rows):
            rest = at + s + blocks * config.block_length
            for buffer, source in ((self.k, k), (self.v, v)):
                buffer[row, :, :s] = source[row, :, at : at + s]
                buffer[row, :, s:n] = source[row, :, rest:]
        self.exact = torch.tensor([n for _, _, n, _ in rows], dtype=torch.int64, device=start.device)
        self._recount()
        self._prepare()
        return self

    @classmethod
    def restored(
        cls,
        config: MixKVQConfig,
        codec: BlockCodec,
        exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        start: torch.Tensor,
        records: RecordTable,
        reference: tuple[torch.Tensor, torch.Tensor] | None,
        queries: QueryStatistics,
        length: int,
        raised: int,
    ) -> PackedStore:
        """A store as it was, from parts that belong together.

        Parameters
        ----------
        exact : (k, v, exact)
            Buffers, as long as they are filled, and tokens in use.
        reference : (mu, has_mu) or None
        others
            As the attributes of the class.

        Raises
        ------
        ValueError
            If a record is damaged, or does not belong there.
        """
        self = cls.__new__(cls)
        self.config, self.codec, self.start, self.queries = config, codec, start, queries
        self._record_bound = ops.codec(codec).record_bound
        self.k, self.v, self.exact = exact
        self.records, (self.mu, self.has_mu) = records, reference or (None, None)
        self.raised, self.length, self.passing = raised, length, 0
        self.placement = Placement()
        self._recount()
        handle = self._core_of(self.records.place, self.records.blocks)  # checks every record
        self._handle = None if operators.waits(self.k) else handle
        return self

    @outside_autograd
    def move(self, device: torch.device, placement: Placement) -> None:
        """Go on on another device."""
        self.placement = placement
        if device.type == self.k.device.type == "cpu":
            return
        for name in ("k", "v", "exact", "start", "mu", "has_mu"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))
        self.records.move(device, offload=placement.offload)
        self.queries.move(device)
        self._recount()

    # ---- growing ---------------------------------------------------------------------------------------------------
    def append(self, k_new: torch.Tensor, v_new: torch.Tensor) -> bool:
        """Append n tokens [B, H, n, D] of the store's dtype to every row's window; True if the buffers had to grow."""
        n = k_new.shape[2]
        grow = n > self._room
        if grow:
            self._resize(-(-(self.k.shape[2] - self._room + n) // GROWTH) * GROWTH)
        self._append(k_new, v_new, n)
        return grow

    def extend(self, k_new: torch.Tensor, v_new: torch.Tensor, margin: int = 0) -> bool:
        """As `append`, but if a block is due (see `flush`) or the buffers are full, nothing is done: False."""
        n = k_new.shape[2]
        if self._slack + margin <= 0 or n > self._room:
            return False
        self._append(k_new, v_new, n)
        return True

    def _append(self, k_new: torch.Tensor, v_new: torch.Tensor, n: int) -> None:
        room, slack, length = self._room - n, self._slack - n, self.length + n
        try:
            ops.append(self._handle or self.core(), k_new, v_new)
        except BaseException:  # Ctrl-C, say, when all was done
            self.rewind(self.length)
            raise
        self._room, self._slack, self.length = room, slack, length

    def rewind(self, length: int) -> None:
        """Forget the columns from this one on, which `append` has added since the last flush."""
        self.torn = True
        more = self.length - length
        room, slack = self._room + more, self._slack + more
        expected = [n + length - self._counted for n in self._exact]
        self.exact.copy_(torch.tensor(expected, dtype=torch.int64, device="cpu"))
        self._room, self._slack, self.length, self.torn = room, slack, length, False

    def flush(self, margin: int = 0) -> bool:
        """Pack every block that is due, row by row, and say whether there was one.

        Parameters
        ----------
        margin : int
            Tokens that stay in the window beyond ``residual_length``.
        """
        if self._slack + margin > 0:
            return False
        self._flush(margin)
        return True

    @outside_autograd
    def _flush(self, margin: int) -> None:
        sink, length = self.config.sink_length, self.config.block_length
        had = [n + self.length - self._counted for n in self._exact]
        blocks = [self.config.due_blocks(n, margin) for n in had]
        exact = [n - m * length for n, m in zip(had, blocks, strict=True)]
        before, after = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (had, exact))
        mark, raised = self.records.mark(), self.raised
        has_mu = None if self.has_mu is None else self.has_mu.clone()
        try:
            self._pack(self.k, self.v, [sink] * len(had), blocks)
            self._move_window(exact, [m * length for m in blocks])
            self.exact.copy_(after)
            self._count(exact)
            self.torn = False
        except BaseException:  # no memory, say: in the records and in the window tokens would be twice
            if not self.torn:
                self.torn = True
                self.records.rewind(mark)
                self.exact.copy_(before)
                if has_mu is not None and self.has_mu is not None:
                    self.has_mu.copy_(has_mu)
                self.raised = raised
                self._count(had)
                self.torn = False
            raise
        capacity = max([self.config.exact_capacity(), *exact])
        if capacity != self.k.shape[2]:
            self._resize(capacity)
        self._prepare()

    def _move_window(self, exact: list[int], packed: list[int]) -> None:
        """Close the gap that ``packed[b]`` tokens behind the sinks leave; ``exact[b]`` tokens remain."""
        sink, moves = self.config.sink_length, list(zip(exact, packed, strict=True))
        rows = [(slice(row, row + 1), move) for row, move in enumerate(moves)]
        for row, (n, gap) in rows if len(set(moves)) > 1 else [(slice(None), move) for move in moves[:1]]:
            for at in range(sink, n, gap) if gap else ():  # as many at once as do not overlap
                to = min(at + gap, n)
                self.torn = True
                for buffer in (self.k, self.v):
                    buffer[row, :, at:to] = buffer[row, :, at + gap : to + gap]

    def _pack(self, k: torch.Tensor, v: torch.Tensor, first: list[int], blocks: list[int]) -> None:
        """Pack ``blocks[b]`` blocks of k, v [B, H, n, D] from token ``first[b]`` on, a few columns at a time."""
        most, length = max(blocks, default=0), self.codec.block_length
        if most == 0:
            return
        importance = self.queries.importance()
        step = columns_at_once(k.shape[0] * k.shape[1] * self._record_bound, k.device.type)
        for column in range(0, most, step):
            counts = [min(max(n - column, 0), step) for n in blocks]
            at = [a + column * length if n else 0 for a, n in zip(first, counts, strict=True)]
            at_, counts_ = torch.tensor((at, counts), dtype=torch.int64, device=k.device)
            packed = ops.pack(self.codec, k, v, at_, counts_, max(counts), importance, self.mu, self.has_mu)
            staging, sizes, raised = packed
            self.passing = max(self.passing, staging.nbytes)
            self.records.add(staging, sizes, counts)
            self.raised += int(raised.sum())

    @outside_autograd
    def _resize(self, capacity: int) -> None:
        """Give the exact buffers room for this many tokens; what is in use is copied."""
        before, used = self.k.shape[2], min(capacity, self.k.shape[2])
        try:
            for name in ("k", "v"):
                old = getattr(self, name)
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, :used] = old[:, :, :used]
                self.passing = max(self.passing, old.nbytes)
                setattr(self, name, new)
        finally:
            if self.k.shape != self.v.shape:  # no memory for the values
                least = min(self.k.shape[2], self.v.shape[2])
                self.k, self.v = self.k[:, :, :least], self.v[:, :, :least]
            self._room += self.k.shape[2] - before
            self._handle = None

    def _recount(self) -> None:
        """After any change but `append` and `flush`: read lengths, so that no step of decoding need read a tensor."""
        self.starts = tuple(self.start.tolist())
        self.padding = max(self.starts, default=0)
        self._count(self.exact.tolist())

    def _count(self, exact: list[int]) -> None:
        """Count free and due tokens, and forget the handle."""
        self._handle = None
        self._exact, self._counted = exact, self.length  # every column since then is a token more in every row
        most = max(exact, default=0)
        self._room = self.k.shape[2] - most
        self._slack = self.config.exact_capacity() - most

    def _prepare(self) -> None:
        """Make the handle now, where that copies to a device: no step shall wait for it."""
        if operators.waits(self.k):
            self.core()

    # ---- reading ---------------------------------------------------------------------------------------------------
    def attend(
        self,
        q: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
        precision: str = "default",
        observe: bool = False,
    ) -> torch.Tensor:
        """Attention of q [B, Q, n, D] over everything stored.

        Parameters
        ----------
        q : tensor [B, Q, n, D]
        mask : tensor [B or 1, Q or 1, n, columns], optional
            bool (True may attend) or float (added), over columns, padding included.
        causal : bool
            Query i stands at the last token but n - 1 - i.
        scaling : float, optional
            Default ``D ** -0.5``.
        softcap : float, optional
        sink_logits : float32 tensor [Q], optional
        precision : {"default", "exact", "fast"}
            As in `ops.attend`.
        observe : bool
            Add all queries to the statistics; the caller counts them.

        Returns
        -------
        tensor [B, n, Q, D], contiguous, in q's dtype
        """
        handle = self._handle or self.core()
        return ops.attend(handle, q, mask, causal, scaling, softcap or 0.0, sink_logits, precision, observe)

    @outside_autograd
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, decoded, [B, H, length, D]; zeros at padding."""
        shape = (*self.k.shape[:2], self.length, self.k.shape[3])
        k, v = self.k.new_zeros(shape), self.k.new_zeros(shape)
        sinks = self.exact.clamp(max=self.config.sink_length)
        ops.unpack(self.core(), k, v, self.start + sinks)
        packed = self.records.blocks * self.config.block_length
        for row, (at, s, n, m) in enumerate(_rows(self.start, sinks, self.exact, packed)):
            for target, buffer in ((k, self.k), (v, self.v)):
                target[row, :, at : at + s] = buffer[row, :, :s]
                target[row, :, at + s + m : at + n + m] = buffer[row, :, s:n]
        return k, v

    def core(self) -> Any:
        """The handle for `ops`: it keeps addresses, so it is made anew whenever a tensor was replaced."""
        if self._handle is None:
            if operators.wanted(self.k):
                self._handle = self._device_handle(*self.records.addresses())
            else:
                self._handle = self._core_of(self.records.place, self.records.blocks)
        return self._handle

    def _core_of(self, place: torch.Tensor, blocks: torch.Tensor) -> Any:
        sink, slabs = self.config.sink_length, self.records.slabs
        sums = self.queries.sums
        return ops.core_layer(self.k, self.v, self.exact, self.start, sink, slabs, place, blocks, self.mu, sums)

    def _device_handle(self, addresses: torch.Tensor, blocks: torch.Tensor) -> DeviceLayer:
        window = self.k, self.v, self.exact, self.start, self.config.sink_length
        history = self.records.slabs, addresses, blocks, self.mu
        sizes = self.codec.block_length, self.records.longest or self._record_bound
        tensors = LayerTensors(*window, *history, self.queries.sums, *sizes)
        return DeviceLayer(tensors, self.placement.workspaces)

    # ---- shortening and moving -------------------------------------------------------------------------------------
    @outside_autograd
    def crop(self, length: int) -> None:
        """Keep the first ``length`` columns. The kept part of a block that is cut goes back to the window, decoded."""
        block, sink, device = self.config.block_length, self.config.sink_length, self.k.device
        exact, had = self.exact.cpu(), self.records.blocks
        tokens = (length - self.start.cpu()).clamp(min=0)
        behind = (tokens - exact.clamp(max=sink)).clamp(min=0)  # tokens kept behind the sinks
        blocks = torch.minimum(behind // block, had)
        cut = blocks < had
        part = torch.where(cut, behind - blocks * block, 0)
        if bool((part > 0).any()):
            k, v = self._decode(blocks, part > 0)
            needed = int(torch.where(part > 0, sink + part, 0).max())
            if needed > self.k.shape[2]:  # buffers from a file are as long as they are filled
                self._resize(self.config.exact_capacity())
            else:  # what was in the window may be needed again: `undoing`
                self.k, self.v = self.k.clone(), self.v.clone()
            for row, m in enumerate(part.tolist()):
                self.k[row, :, sink : sink + m] = k[row, :, :m]
                self.v[row, :, sink : sink + m] = v[row, :, :m]
        self.exact = torch.where(cut, tokens.clamp(max=sink) + part, tokens - blocks * block).to(device)
        self.start = self.start.clamp(max=length)
        if bool(cut.any()):
            self.records.truncate(blocks)
            self._drop_references()
        self.length = length
        self._recount()

    def _decode(self, index: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block ``index[b]`` of the rows ``wanted``, decoded, [B, H, T, D]."""
        batch, heads = self.k.shape[:2]
        column = index.clamp(max=self.records.place.shape[2] - 1).view(-1, 1, 1).expand(-1, heads, 1)
        place = self.records.place.gather(2, column).contiguous()
        k = self.k.new_zeros(batch, heads, self.config.block_length, self.k.shape[3])
        v, device = torch.zeros_like(k), k.device
        if operators.wanted(k):
            found = operators.addresses(self.records.slabs, place)
            handle: Any = self._device_handle(found.to(device), wanted.to(device, torch.int64))
        else:
            handle = self._core_of(place, wanted.to(torch.int64))
        ops.unpack(handle, k, v, torch.zeros_like(self.exact))
        return k, v

    def _drop_references(self) -> None:
        """A head without a coded record starts over with its key reference."""
        if self.has_mu is not None:
            self.has_mu = self.has_mu * self.records.any_coded().to(self.has_mu)

    @outside_autograd
    def gather(self, rows: torch.Tensor) -> None:
        """Keep these batch rows, in this order; a row may come several times and then shares its records."""
        held = {name: getattr(self, name) for name in ("k", "v", "exact", "start", "mu", "has_mu")}
        chosen = {name: t.index_select(0, rows) for name, t in held.items() if t is not None}
        self.records.gather(rows)
        self.__dict__.update(chosen)
        self.queries.gather(rows)
        self._recount()

    # ---- accounts --------------------------------------------------------------------------------------------------
    @property
    def place(self) -> torch.Tensor:
        """int64 [B, H, blocks]: where each record lies."""
        return self.records.place

    @property
    def blocks(self) -> torch.Tensor:
        """int64 [B]: blocks of each row."""
        return self.records.blocks

    def record(self, row: int, head: int, block: int) -> bytes:
        """The bytes of one record."""
        return self.records.record(row, head, block)

    def totals(self) -> StoreTotals:
        """Bytes and elements, every live record counted once."""
        length, (_, heads, _, dim) = self.config.block_length, self.k.shape
        tokens = int(self.exact.sum()) + length * int(self.blocks.sum())
        return count(self.records, 2 * length * dim, 2 * tokens * heads * dim, self.raised)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""
        tensors = [self.k, self.v, self.exact, self.start, self.mu, self.has_mu, *self.queries.tensors()]
        return [t for t in [*tensors, *self.records.tensors()] if t is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.records.device != self.k.device:  # torch.load(map_location=...)
            self.records.move(self.k.device, offload=self.placement.offload)


def _rows(*columns: torch.Tensor) -> list[tuple[int, ...]]:
    """One tuple of ints per batch row."""
    return list(zip(*(c.tolist() for c in columns), strict=True))
