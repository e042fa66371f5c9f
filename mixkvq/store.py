"""`PackedStore`: the packed history and the exact window of one layer, as plain tensors; nothing of transformers.

The tokens of batch row b, counted from its first real token (column ``start[b]``; padding before it is not stored), are

    sinks | packed blocks of T tokens | window

Sinks and window lie in one exact buffer, ``exact[b]`` tokens, sinks first. While a window holds at least
``residual_length`` tokens its oldest block is packed. Every row has its own start, window and number of blocks, so a
row gives the same records alone and in a padded batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import _core, ops
from .autograd import OrdinaryCopies, outside_autograd
from .config import BlockCodec, MixKVQConfig
from .queries import QueryStatistics
from .slabs import RecordTable

STAGING_BYTES = 8 << 20
SLAB_COLUMNS = 16  # block columns (one block of every row and head) per slab, at most
GROWTH = 64  # exact buffers grow to a multiple of this, and shrink back when they are flushed


class StoreTotals(NamedTuple):
    """What a store holds; the fields are those of `report.LayerReport`."""

    elements: int
    record_bytes: int
    code_bytes: int
    metadata_bytes: int
    record_elements: int
    raised_scales: int
    exact_blocks: int


class PackedStore(OrdinaryCopies):
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
    """

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
    ) -> None:
        batch, device = len(start), start.device
        self.config, self.codec, self.start = config, codec, start.clone()
        self._record_bound = ops.codec(codec).record_bound
        capacity = config.sink_length + config.residual_length + margin
        self.k = torch.zeros(batch, heads, capacity, codec.head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.exact = torch.zeros(batch, dtype=torch.int64, device=device)
        self.records = RecordTable(batch, heads, device)
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
    ) -> PackedStore:
        """Take over the plain keys and values of a prompt: due blocks are packed where they lie, the rest is copied.

        Parameters
        ----------
        config, codec
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
        self = cls(config, codec, start, k.shape[1], k.dtype, margin, queries)
        self.length = k.shape[2]
        rows = []
        for at in start.tolist():
            tokens = self.length - at
            sinks, blocks = min(tokens, config.sink_length), self._due(tokens, margin)
            rows.append((at, sinks, tokens - blocks * config.block_length, blocks))
        self._pack(k, v, [at + sinks for at, sinks, _, _ in rows], [blocks for *_, blocks in rows])
        for row, (at, s, n, blocks) in enumerate(rows):
            rest = at + s + blocks * config.block_length
            for buffer, source in ((self.k, k), (self.v, v)):
                buffer[row, :, :s] = source[row, :, at : at + s]
                buffer[row, :, s:n] = source[row, :, rest:]
        self.exact = torch.tensor([n for _, _, n, _ in rows], dtype=torch.int64, device=start.device)
        self._recount()
        return self

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
        ops.append(self._handle or self.core(), k_new, v_new)
        self._room -= n
        self._slack -= n
        self.length += n

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
        exact: list[int] = self.exact.tolist()
        blocks = [self._due(n, margin) for n in exact]
        self._pack(self.k, self.v, [sink] * len(exact), blocks)
        for row, n in enumerate(blocks):
            packed = n * length
            exact[row] -= packed
            for at in range(sink, exact[row], packed) if packed else ():  # as many at once as do not overlap
                to = min(at + packed, exact[row])
                for buffer in (self.k, self.v):
                    buffer[row, :, at:to] = buffer[row, :, at + packed : to + packed]
        self.exact.copy_(torch.tensor(exact))
        capacity = max([sink + self.config.residual_length, *exact])
        if capacity != self.k.shape[2]:
            self._resize(capacity)
        self._recount()

    def _due(self, exact: int, margin: int) -> int:
        """Blocks to pack of a row, so that fewer than ``residual_length + margin`` tokens stay in the window."""
        window = exact - self.config.sink_length - self.config.residual_length - margin
        return window // self.config.block_length + 1 if window >= 0 else 0

    def _pack(self, k: torch.Tensor, v: torch.Tensor, first: list[int], blocks: list[int]) -> None:
        """Pack ``blocks[b]`` blocks of k, v [B, H, n, D] from token ``first[b]`` on, a few columns at a time."""
        most, length = max(blocks, default=0), self.codec.block_length
        if most == 0:
            return
        importance = self.queries.importance()
        column_bytes = k.shape[0] * k.shape[1] * self._record_bound
        step = max(1, min(SLAB_COLUMNS, STAGING_BYTES // column_bytes))
        for column in range(0, most, step):
            counts = [min(max(n - column, 0), step) for n in blocks]
            at = [a + column * length if n else 0 for a, n in zip(first, counts, strict=True)]
            at_, counts_ = torch.tensor((at, counts), dtype=torch.int64, device=k.device)
            staging, sizes, raised = ops.pack(
                self.codec, k, v, at_, counts_, max(counts), importance, self.mu, self.has_mu
            )
            self.passing = max(self.passing, staging.nbytes)
            self.records.add(staging, sizes, counts)
            self.raised += int(raised.sum())

    @outside_autograd
    def _resize(self, capacity: int) -> None:
        """Give the exact buffers room for this many tokens; what is in use is copied."""
        used = min(capacity, self.k.shape[2])
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            self.passing = max(self.passing, old.nbytes)
            setattr(self, name, new)
        self._recount()

    def _recount(self) -> None:
        """After any change but `append`: forget the core's handle, count free and due tokens."""
        self._handle = None
        most = int(self.exact.max()) if len(self.exact) else 0
        self._room = self.k.shape[2] - most
        self._slack = self.config.sink_length + self.config.residual_length - most
        self.starts = tuple(self.start.tolist())
        self.padding = max(self.starts, default=0)

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
        """The core's handle: it keeps addresses, so it is made anew whenever a tensor was replaced."""
        if self._handle is None:
            self._handle = self._core_of(self.records.place, self.records.blocks)
        return self._handle

    def _core_of(self, place: torch.Tensor, blocks: torch.Tensor) -> Any:
        sink, slabs = self.config.sink_length, self.records.slabs
        sums = self.queries.sums
        return ops.layer(self.k, self.v, self.exact, self.start, sink, slabs, place, blocks, self.mu, sums)

    # ---- shortening and moving -------------------------------------------------------------------------------------
    @outside_autograd
    def crop(self, length: int) -> None:
        """Keep the first ``length`` columns. The kept part of a block that is cut goes back to the window, decoded."""
        block, sink = self.config.block_length, self.config.sink_length
        tokens = (length - self.start).clamp(min=0)
        behind = (tokens - self.exact.clamp(max=sink)).clamp(min=0)  # tokens kept behind the sinks
        blocks = torch.minimum(behind // block, self.records.blocks)
        cut = blocks < self.records.blocks
        part = torch.where(cut, behind - blocks * block, 0)
        if bool((part > 0).any()):
            k, v = self._decode(blocks, part > 0)
            for row, m in enumerate(part.tolist()):
                self.k[row, :, sink : sink + m] = k[row, :, :m]
                self.v[row, :, sink : sink + m] = v[row, :, :m]
        self.exact = torch.where(cut, tokens.clamp(max=sink) + part, tokens - blocks * block)
        self.start.clamp_(max=length)
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
        v = torch.zeros_like(k)
        ops.unpack(self._core_of(place, wanted.to(torch.int64)), k, v, torch.zeros_like(index))
        return k, v

    def _drop_references(self) -> None:
        """A head without a coded record starts over with its key reference."""
        if self.has_mu is not None:
            self.has_mu[~self.records.any_coded()] = 0

    @outside_autograd
    def gather(self, rows: torch.Tensor) -> None:
        """Keep these batch rows, in this order; a row may come several times and then shares its records."""
        self.records.gather(rows)
        for name in ("k", "v", "exact", "start", "mu", "has_mu"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows))
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
        codes = metadata = exact = 0
        for record in self.records.records():
            info = _core.inspect(record)
            codes, metadata, exact = (
                codes + info["code_bytes"],
                metadata + info["metadata_bytes"],
                exact + (info["kind"] == 1),
            )
        live, sizes = self.records.distinct()
        block = 2 * self.config.block_length * self.k.shape[3]
        tokens = int(self.exact.sum() + self.blocks.sum() * self.config.block_length)
        elements = 2 * tokens * self.k.shape[1] * self.k.shape[3]
        return StoreTotals(elements, int(sizes.sum()), codes, metadata, block * len(live), self.raised, exact)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""
        table = self.records
        tensors = [self.k, self.v, self.exact, self.start, self.mu, self.has_mu, *self.queries.tensors()]
        return [t for t in [*tensors, table.place, table.blocks, *table.slabs] if t is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


def _rows(*columns: torch.Tensor) -> list[tuple[int, ...]]:
    """One tuple of ints per batch row."""
    return list(zip(*(c.tolist() for c in columns), strict=True))
