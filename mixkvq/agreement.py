"""The short path of decoding: an attention call that asks a packed layer for what the call before it asked.

`hook` checks every argument of a call on a packed layer. When nothing stood in the way, what it looked at is kept in an
`Agreement`; a later call that agrees with it goes to the kernel at once, any other one is checked in full. There is an
agreement only about calls with one query.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import compat
from .autograd import in_dual_level
from .handle import KEYS, VALUES, PackedHandle
from .identity import Attention, Identity
from .masks import reveals_padding
from .operators import waits
from .proof import SINKS, sink_logits

if TYPE_CHECKING:
    from .hook import Call
    from .layer import MixKVQLayer

POSITIONS = frozenset(
    ("cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "num_items_in_batch", "position_ids", "seq_idx")
)
"""Arguments that differ from step to step and that attention over all cached keys does not depend on."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a call that was checked in full looked like.

    Attributes
    ----------
    identity : Identity
        Of the attention function.
    names : tuple of str
        Names of the keyword arguments, in the call's order.
    watched : tuple of (str, value)
        The keyword arguments that must be the same again, None, numbers or strings: all but `POSITIONS` and sinks.
    tensors : tuple of str
        Sinks that were given, as tensors: whatever they hold.
    shape, dtype
        Of the queries.
    mask : (shape without columns, dtype) or None
        Of the mask.
    group : int
        Query heads per KV head.
    most : float
        Columns that fit the sliding window.
    scaling, softcap
        For the kernel.
    sinks : bool
        Whether sink logits take part.
    """

    identity: Identity
    names: tuple[str, ...]
    watched: tuple[tuple[str, Any], ...]
    tensors: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    mask: tuple[torch.Size, torch.dtype] | None
    group: int
    most: float
    scaling: float | None
    softcap: float | None
    sinks: bool

    @classmethod
    def about(cls, call: Call, layer: MixKVQLayer) -> Agreement | None:
        """The agreement about a call that was served, or None if there can be none."""
        given, query, mask, store, proof = call.arguments, call.query, call.mask, layer.store, layer.proof
        tensors = tuple(name for name in given if name in SINKS and isinstance(given[name], torch.Tensor))
        watched = tuple((name, value) for name, value in given.items() if name not in POSITIONS.union(tensors))
        if (
            store is None
            or proof is None
            or query.shape[2] != 1
            or not all(value is None or isinstance(value, (bool, int, float, str)) for _, value in watched)
        ):
            return None
        window = given.get("sliding_window")
        return cls(
            identity=proof.identity,
            names=tuple(given),
            watched=watched,
            tensors=tensors,
            shape=query.shape,
            dtype=query.dtype,
            mask=None if mask is None else (mask.shape[:3], mask.dtype),
            group=query.shape[1] // store.k.shape[1],
            most=float("inf") if window is None or window == proof.window else window,
            scaling=given.get("scaling"),
            softcap=given["softcap"] if proof.softcap else None,
            sinks=proof.sinks,
        )

    def covers(self, function: Attention, query: torch.Tensor, arguments: dict[str, Any]) -> bool:
        """Whether a call asks for the same, its mask left aside."""
        if (
            query.shape != self.shape
            or query.dtype is not self.dtype
            or tuple(arguments) != self.names
            or not (self.identity.thing() is function or self.identity.of(function))
            or (query.requires_grad and torch.is_grad_enabled())
            or in_dual_level()
            or compat.attention_weights_wanted()
        ):
            return False
        for name, value in self.watched:
            given = arguments[name]
            if given is not value and (type(given) is not type(value) or given != value):
                return False
        return all(isinstance(arguments[name], torch.Tensor) for name in self.tensors) if self.tensors else True

    def covers_mask(self, mask: torch.Tensor, starts: tuple[int, ...], columns: int) -> bool:
        """Whether a mask is one as before over at least these columns, and hides all padding.

        What it hides is not looked at where that would wait for a device: padding is not stored and stays hidden, and
        the call that is agreed about was looked at.

        Parameters
        ----------
        mask : tensor
        starts : tuple of int
            Each row's column of its first real token.
        columns : int
        """
        global _latest
        latest, kind = _latest, self.mask
        if latest[0]() is mask and latest[1] == columns and latest[2] == kind and latest[3] == starts:
            return True  # another layer has asked
        if kind is None or mask.dim() != 4 or (mask.shape[:3], mask.dtype) != kind or mask.shape[3] < columns:
            return False
        if any(starts) and not waits(mask) and reveals_padding(mask, starts):
            return False
        _latest = weakref.ref(mask), columns, kind, starts
        return True


_latest: tuple[Any, ...] = (lambda: None, 0, None, ())
"""The mask that an agreement covered last: all layers of a step get the same."""


def attend_as_agreed(function: Attention, args: tuple[Any, ...], arguments: dict[str, Any]) -> torch.Tensor | None:
    """Serve a call whose keys are a handle, [B, 1, Q, D]; None if it must be checked in full.

    Parameters
    ----------
    function : callable
        The attention function.
    args : tuple of five
        Module, queries, keys, values, mask.
    arguments : dict
        The call's keyword arguments.
    """
    module, query, key, value, mask = args
    layer = key.layer
    agreement, store = layer.agreement, layer.store
    if (
        agreement is None
        or type(value) is not PackedHandle
        or value.layer is not layer
        or key.which != KEYS
        or value.which != VALUES
        or key.epoch != layer.epoch
        or layer.length > agreement.most
        or not agreement.covers(function, query, arguments)
    ):
        return None
    if mask is None:
        if agreement.mask is not None or store.padding:
            return None
    elif not (type(mask) is torch.Tensor and agreement.covers_mask(mask, store.starts, layer.length)):
        return None
    sinks = None
    if agreement.sinks and (sinks := sink_logits(module, arguments)) is None:
        return None
    return layer.attend(query, agreement, mask, sinks)
