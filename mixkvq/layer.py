"""`MixKVQLayer`: one layer of the cache and the path it takes.

plain        nothing packed yet; the model gets the very tensors that `DynamicCache` would give it
packed       the model gets handles, the attention hook runs the kernel on the packed records; from a file: decoded
             tensors once, so that attention is proved to be what the kernel computes
dequantized  packed as well, but the model's attention is not what the kernel computes: it gets decoded tensors
native       full precision for good: training, or keys and values that records cannot hold
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicLayer

from . import compat, guard, lookup, ops, reasons
from .agreement import Agreement
from .arrays import precision_code
from .assigning import AssignedStates
from .autograd import differentiated, in_dual_level, outside_autograd
from .config import MixKVQConfig
from .guard import NOT_YET, Begun, exclusive, undoing
from .handle import KEYS, Handles
from .masks import NO_TOKEN, first_columns
from .placement import Placement
from .proof import Proof
from .queries import QueryStatistics
from .reasons import Reason
from .report import LayerReport, Ledger, held_bytes
from .sending import SentAsCopy
from .states import check_continues, check_states, codec_of, common_dtype, holds, obstacle, own
from .store import PackedStore

PLAIN, PACKED, DEQUANTIZED, NATIVE = "plain", "packed", "dequantized", "native"
EVERY_STEP = "keys and values are decoded in every step: "


class MixKVQLayer(AssignedStates, SentAsCopy, DynamicLayer):
    """Keys and values of one attention layer.

    Parameters
    ----------
    config : MixKVQConfig, optional
        Default: the default preset.
    precision : {"default", "exact", "fast"}
        Of attention, as in `MixKVQCache`.
    ledger, placement : optional
        Of the cache it belongs to.

    Attributes
    ----------
    index : int or None
        Of the layer in its cache, which sets it.
    compiled : bool
        Whether a compiled model updates it: the hook sees nothing then.
    busy : int
        Which thread changes or reads it (see `guard`), 0 for none, -1: it is torn.
    begun : Begun
        Its length when the last forward pass began, and whose must be the same (see `passes`).
    decoded_for : Reason or None
        Why its last decoded call was decoded.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        config: MixKVQConfig | None = None,
        ledger: Ledger | None = None,
        precision: str = "default",
        placement: Placement | None = None,
        **_: Any,
    ) -> None:
        self.mixkvq_config = config or MixKVQConfig.preset("default")
        precision_code(precision)
        self.precision = "exact" if self.mixkvq_config.allocate == "exact" else precision
        self.ledger, self.placement = ledger or Ledger(), placement or Placement()
        self.record_past = self.compiled = False
        self.epoch = self.dequantizations = 0
        self.index: int | None = None
        self.decoded_for: Reason | None = None
        self._bytes = 0
        self.busy = 0
        self._clear(reasons.EMPTY)

    def _clear(self, reason: Reason) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.mode, self.reason = PLAIN, reason
        self.store: PackedStore | None = None
        self.proof: Proof | None = None
        self.agreement: Agreement | None = None
        self._token: tuple[torch.Size, torch.dtype, int] | None = None  # of the last ones of a packed layer, and device
        self.queries = QueryStatistics(self.mixkvq_config.salience)
        self.length, self.begun = 0, NOT_YET
        self.waiting = False  # handed tensors out that the hook has not seen coming back
        self._unseen = False  # overlooked such: what attention computes is open, even if decoded tensors are handed out
        self._unsettled = True  # plain tensors may be views of larger ones, or statistics are not accounted for
        self._k: torch.Tensor | None = None
        self._v: torch.Tensor | None = None
        self.start: torch.Tensor | None = None  # int64 [B] on the CPU, known once the hook has seen a call
        self._unpadded = False  # whether a call without a mask was seen: every row begins at column 0
        self._account()

    # ---- what transformers asks ------------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Take over dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self, *_: Any) -> int:
        """Columns seen, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """-1: grows without limit."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns of the mask for this many new queries, and the first column."""
        return self.length + compat.query_length(query_length), 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mode}, {self.length} tokens)"

    def __getattr__(self, name: str) -> Any:  # of models that ask for more before the layout is learned (DeepSeek V4)
        fix = "if a model asks for it, give the cache that model's layout: MixKVQCache(config=model.config)"
        raise AttributeError(f"{type(self).__name__} has no {name!r}; {fix}", name=name, obj=self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "busy": guard.mark_of_copy(self)}

    def __copy__(self) -> Self:
        """As of a `DynamicLayer`: what one goes on with does not reach the other. Only what never changes is shared."""
        records = [] if self.store is None else self.store.records.slabs
        return copy.deepcopy(self, {id(thing): thing for thing in (self._k, self._v, *records) if thing is not None})

    # ---- growing ---------------------------------------------------------------------------------------------------
    @exclusive
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; what to attend to comes back.

        Parameters
        ----------
        key_states, value_states : tensor [B, H, n, D]

        Returns
        -------
        keys, values : tensor [B, H, N, D]
            Plain or decoded tensors, or `PackedHandle`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; the layer is unchanged then, as after any other error.
        RuntimeError
            If another thread uses the layer, or the cache must be reset.
        """
        check_states(key_states, value_states)
        self._check_assigned()
        if self.length:
            check_continues(key_states, value_states, self.states)
        self.overlooked()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.mode != NATIVE and (reason := self._obstacle(key_states, value_states)):
            self.become_native(reason)
        self.epoch += 1
        if self.store is None:
            return self._update_plain(key_states, value_states)
        if self.store.flush(self._margin):
            self._account()
        dtype = self.store.k.dtype
        waiting = self.mode != PACKED or self.unproved
        try:
            if self.store.append(key_states.to(dtype), value_states.to(dtype)):
                self._account()
            shape = (*key_states.shape[:2], self.store.length, key_states.shape[3])
            pair = self.decode() if waiting else Handles().give(self, shape, dtype)
        except BaseException:
            self.store.rewind(self.length)
            raise
        self.waiting, self.length = waiting, self.store.length
        alike = key_states.dtype == value_states.dtype == dtype
        self._token = (key_states.shape, dtype, key_states.get_device()) if alike and not waiting else None
        return pair

    def extend(self, key: torch.Tensor, value: torch.Tensor, handles: Handles) -> tuple[Any, Any] | None:
        """As `update`, if these are tokens like those before and there is nothing to check, to convert or to pack."""
        store, token = self.store, self._token
        if (
            store is None
            or token is None
            or not type(key) is type(value) is torch.Tensor
            or not key.shape == value.shape == token[0]
            or not key.dtype == value.dtype == token[1]
            or not key.get_device() == value.get_device() == token[2]
            or (torch.is_grad_enabled() and (key.requires_grad or value.requires_grad))
            or in_dual_level()
        ):
            return None
        if self.busy:
            raise guard.refusal(self)
        self.busy = guard.short  # no other thread runs between the question and this
        try:
            if not store.extend(key, value, self._margin):
                self.busy = 0
                return None
            self.epoch += 1
            (batch, heads, _, dim), dtype, _ = token
            pair = handles.give(self, (batch, heads, store.length, dim), dtype)
            self.length = store.length
        except BaseException:
            store.rewind(self.length)
            self.busy = guard.BROKEN if store.torn else 0
            raise
        self.busy = 0
        return pair

    def _update_plain(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._k is None or self._v is None:
            # copies: the caller may use its tensors again
            k, v = (t.view_as(t) if t.requires_grad or differentiated(t) else t.detach().clone() for t in (key, value))
            length = self.length + key.shape[-2]
            self._k, self._v, self.waiting, self.length, self._unsettled = k, v, True, length, True
            if self.mode == PLAIN:
                self.reason = reasons.FILLED
            self._account()
            return key, value
        k, v = torch.cat([self._k, key], -2), torch.cat([self._v, value], -2)
        length = self.length + key.shape[-2]
        self._k, self._v, self.waiting, self.length = k, v, True, length
        if self._unsettled:
            self._account()
        else:
            new = self._bytes + key.nbytes + value.nbytes
            self.ledger.change(self._bytes, new)
            self._bytes = new
        return self._k, self._v

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact tensors of keys and values: all of a plain layer, buffers of a packed one."""
        if self.store is not None:
            return self.store.k, self.store.v
        assert self._k is not None and self._v is not None
        return self._k, self._v

    def _obstacle(self, key: torch.Tensor, value: torch.Tensor) -> Reason | None:
        """Why these tokens must stay in full precision."""
        if differentiated(key, value):
            return reasons.GRADIENTS
        if not self.length:
            return obstacle(self.mixkvq_config, key, value)
        if self.store is not None and not all(map(holds, self._dtypes, (key.dtype, value.dtype))):
            return reasons.wider(key.dtype, value.dtype, self.store.k.dtype)
        return None

    # ---- choosing the path -----------------------------------------------------------------------------------------
    def ready(self) -> bool:
        """Whether a plain layer has enough tokens to pack, and every row a real one."""
        return self.mode != NATIVE and self._k is not None and len(self._k) > 0 and self._lacking() is None

    def _lacking(self) -> Reason | None:
        """What a plain layer has too little of to be packed."""
        first = last = 0
        if self.start is not None and len(self.start):
            first, last = int(self.start.min()), int(self.start.max())
        if self.length >= self._threshold and last == NO_TOKEN:
            return reasons.NO_REAL_TOKEN
        if self.length - first < self._threshold:
            return reasons.waiting(self.mixkvq_config.exact_capacity())
        return None

    @property
    def _threshold(self) -> int:
        """Tokens of a row from which on it has a block to pack."""
        return self.mixkvq_config.exact_capacity(self._margin)

    @property
    def _margin(self) -> int:
        """Tokens more that stay exact while a rollback is expected (assisted decoding)."""
        return self.mixkvq_config.block_length if self.record_past else 0

    def overlooked(self) -> None:
        """The tensors handed out last never reached the hook: once packing is due, go on with decoded tensors.

        Unless no attention may have run at all: who fills a cache by `update` need not compute with what comes back.
        """
        if fallen := self.waiting and (self.unproved or (self.mode == PLAIN and self.ready())):
            blind = reasons.COMPILED if self.compiled else lookup.blindness()
            fallen, self._unseen = self._unseen or blind != reasons.INVISIBLE, True
            if fallen:
                self.mode, self.reason = DEQUANTIZED, blind
            elif self.mode == PLAIN:
                self.reason = reasons.FILLED
        if self.mode == DEQUANTIZED and self.waiting:
            self.pack()
        self.waiting = False
        if fallen:  # last: under -W error a warning is an exception
            self.warn(EVERY_STEP, self.reason)

    @property
    def unproved(self) -> bool:
        """Whether its records come from a file, and no attention call was seen since."""
        return self.mode == PACKED and self.proof is None

    def undecided(self) -> bool:
        """Whether an attention call that is seen must tell the path: now, or after all."""
        if self.mode == PLAIN:
            return self.ready()
        return self.unproved or (self.mode == DEQUANTIZED and self._unseen)

    def decide(self, verdict: Proof | Reason | None) -> None:
        """Choose the path by what `proof.prove` found."""
        self._unseen &= verdict is None
        if isinstance(verdict, Proof):
            self.mode, self.proof = PACKED, verdict
            self.reason = reasons.packed(verdict.function)
        elif verdict is not None:
            self.mode, self.reason = DEQUANTIZED, verdict
        elif self.mode == PLAIN:
            self.reason = reasons.UNPROVED

    def keep_padding(self) -> None:
        """Store what is before every row's first token too: attention does not hide it."""
        self.start = None

    def warn(self, effect: str, reason: Reason) -> None:
        """Warn once per cache, naming the layer."""
        self.ledger.warn(f"layer {self.index}: " * (self.index is not None) + f"{effect}{reason}")

    def served_decoded(self, reason: Reason) -> None:
        """Remember, and warn, why a packed layer had to be decoded for somebody."""
        self.decoded_for = reason
        self.warn("keys and values are decoded for a call that the kernel cannot serve: ", reason)

    def become_native(self, reason: Reason) -> None:
        """Keep everything in full precision from now on."""
        if self.store is not None:
            self._k, self._v = self.decode()
            self.store, fallen = None, True
        else:
            fallen = False
        self.mode, self.reason = NATIVE, reason
        self._account()
        if fallen:
            self.warn("went from packed to full precision: ", reason)

    @exclusive
    def observe(self, query: torch.Tensor, mask: torch.Tensor | None) -> None:
        """See one attention call: where rows begin, and what their queries look like.

        Parameters
        ----------
        query : tensor [B, Q, n, D]
            Of the last ``n`` tokens.
        mask : tensor [B or 1, Q or 1, n, columns] or None
        """
        keys = self.states[KEYS]
        first = None
        if self.store is None and not self._unpadded:
            self._unpadded = mask is None
            start = first_columns(mask, keys.shape[0], self.length)
            self.start = start if self.start is None else torch.minimum(self.start, start)
            past = self.length - query.shape[2]
            if bool((self.start > past).any()):
                first = (self.start - past).clamp(0, query.shape[2]).to(keys.device)
        if query.shape[0] == keys.shape[0] and query.shape[1] % keys.shape[1] == 0 and query.shape[3] == keys.shape[3]:
            self._unsettled |= self.queries.sum is None
            self.queries.add(query, keys.shape[1], first)

    @exclusive
    def pack(self) -> None:
        """Pack what is due, if there is memory; let go of memory that belongs to the model."""
        try:
            self._pack()
        except Exception as error:  # the next update tries again
            if not guard.lacks_memory(error):
                raise

    def _pack(self) -> None:
        if self.store is not None:
            if self.store.flush(self._margin):
                self._account()
        elif self.mode in (PACKED, DEQUANTIZED) and self.ready():
            self._begin()
        elif self._unsettled and self._k is not None and self._v is not None and not self._k.requires_grad:
            self._k, self._v = own(self._k), own(self._v)  # views of a fused projection would keep all of it
            self._account()
            self._unsettled = False
        if self.mode == PLAIN and (lacking := self._lacking()) is not None:
            self.reason = lacking

    def _begin(self) -> None:
        k, v = self.states
        start = k.new_zeros(k.shape[0], dtype=torch.int64) if self.start is None else self.start.to(k.device)
        codec, dtype = codec_of(self.mixkvq_config, k, v), common_dtype(k, v)
        store = PackedStore.begin(
            self.mixkvq_config, codec, k.to(dtype), v.to(dtype), start, self.queries, self._margin, self.placement
        )
        store.passing += held_bytes((k, v))
        dtypes = k.dtype, v.dtype
        self.store, self._dtypes, self._k, self._v, self.start = store, dtypes, None, None, None
        self._account()

    # ---- reading ---------------------------------------------------------------------------------------------------
    def attend(
        self, query: torch.Tensor, agreement: Agreement, mask: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Serve a call that agrees with an earlier one, [B, 1, Q, D]; see its queries and pack what is due."""
        store = self.store
        assert store is not None
        if self.busy:
            raise guard.refusal(self)
        self.busy, whole = guard.short, self.queries.whole + agreement.group
        try:
            output = ops.attend(
                store.core(),
                query,
                mask,
                False,
                agreement.scaling,
                agreement.softcap or 0.0,
                sinks,
                self.precision,
                True,
            )
            self.queries.whole = whole
            try:
                if store.flush(self._margin):
                    self._account()
            except Exception as error:  # as in `pack`
                if not guard.lacks_memory(error):
                    raise
        except BaseException:
            self.busy = guard.BROKEN if store.torn else 0
            raise
        self.busy = 0
        return output

    @exclusive
    def attend_in_full(self, query: torch.Tensor, mask: torch.Tensor | None, **arguments: Any) -> torch.Tensor:
        """Attention by the kernel, as `PackedStore.attend`."""
        assert self.store is not None
        return self.store.attend(query, mask, precision=self.precision, **arguments)

    @exclusive
    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as ordinary tensors [B, H, N, D]."""
        if self.store is None:
            return self.states
        self.dequantizations += 1
        return self.store.read()

    # ---- shortening and moving -------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget all tokens, also of a layer that is torn."""
        guard.alone_with([self], self._forget, emptying=True)

    def _forget(self) -> None:
        self.epoch += 1
        self._clear(reasons.EMPTY)

    def activate_past_recording(self) -> None:
        """A rollback by `crop` may follow every call: keep a block more exact."""
        self.record_past = True

    @outside_autograd
    def _crop_plain(self, keep: int) -> None:
        self._k, self._v = (t[..., :keep, :].clone() for t in self.states)
        if self.start is not None:
            self.start = torch.where(self.start >= keep, NO_TOKEN, self.start)

    @exclusive
    @undoing
    def crop(self, tokens_to_remove: Any) -> None:
        """Remove tokens from the end; the argument is that of the installed transformers.

        Raises
        ------
        ValueError
            For a positive number, from transformers 5.20 on.
        """
        if (keep := compat.crop_target(self.length, tokens_to_remove)) < self.length:
            self.epoch += 1
            if keep == 0:
                self._clear(reasons.EMPTIED)
                return
            if self.store is None:
                self._crop_plain(keep)
            else:
                self.store.crop(keep)
            self.length, self.begun = keep, Begun(keep, None)
            self._account()

    def rolled_back(self) -> None:
        """All layers are cropped: no margin is needed until the next pass. What is packed now cannot be undone."""
        if self.record_past and self.mode in (PACKED, DEQUANTIZED):
            self.record_past = False
            try:
                self.pack()
            finally:
                self.record_past = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows ``beam_idx``, in this order."""
        self._gather(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; the copies share its records."""
        if self.length:
            self._gather(torch.arange(self.states[KEYS].shape[0], device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Only the rows ``indices``: integers, a mask, a slice, or one integer for a batch of one row."""
        if self.length:
            device = indices.device if isinstance(indices, torch.Tensor) else "cpu"
            rows = torch.arange(self.states[KEYS].shape[0], device=device)
            self._gather(rows[list(indices) if isinstance(indices, (tuple, range)) else indices].flatten())

    @exclusive
    @undoing
    def _gather(self, rows: torch.Tensor) -> None:
        if not self.length:
            return
        states, rows = self.states[KEYS], rows.to(torch.int64)
        batch = states.shape[0]
        if len(rows) and not -batch <= int(rows.min()) <= int(rows.max()) < batch:
            raise IndexError(f"batch index {rows.tolist()}, must be in 0 to {batch - 1}")
        rows = (rows % batch).to(states.device)
        self.epoch += 1
        self.agreement = self._token = None
        if self.store is not None:
            self.store.gather(rows)
        else:
            k, v = self.states
            self._k, self._v = k.index_select(0, rows), v.index_select(0, rows)
            self.start = None if self.start is None else self.start[rows.cpu()]
            self.queries.gather(rows)
        self._account()

    def offload(self) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError("MixKVQCache moves no layers; offload=True keeps records of CUDA layers on the host")

    prefetch = offload

    # ---- accounts --------------------------------------------------------------------------------------------------
    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""
        if self.store is not None:
            return self.store.tensors()
        return [t for t in (self._k, self._v, self.start, *self.queries.tensors()) if t is not None]

    def _account(self) -> None:
        held, passing = held_bytes(self.tensors()), 0
        if self.store is not None:
            passing, self.store.passing = self.store.passing, 0
        self.ledger.change(self._bytes, held, passing)
        self._bytes = held

    @property
    def path(self) -> str:
        """As in `report.LayerReport`: a layer that has packed nothing yet is native."""
        return self.mode if self.mode in (PACKED, DEQUANTIZED) else NATIVE

    def report(self, index: int) -> LayerReport:
        """What this layer holds."""
        exact = {"elements": sum(t.numel() for t in (self._k, self._v) if t is not None)}
        totals = exact if self.store is None else self.store.totals()._asdict()
        totals |= {"dequantizations": self.dequantizations, "decoded_for": self.decoded_for}
        return LayerReport(index, self.path, self.reason, self.length, held_bytes(self.tensors()), **totals)
