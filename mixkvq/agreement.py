"""The short path of decoding: an attention call that asks a packed layer for what the call before it asked.

`hook` checks every argument of a call on a packed layer. When nothing stood in the way, what it looked at is kept in an
`Agreement`; a later call that agrees with it goes to the kernel at once, any other one is checked in full. There is an
agreement only about calls without a mask, with one query, on rows without padding, and without learned sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import compat
from .handle import KEYS, VALUES, PackedHandle
from .identity import Attention, Identity

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
        The keyword arguments that must be the same again, None, numbers or strings: all but `POSITIONS`.
    shape, dtype
        Of the queries.
    group : int
        Query heads per KV head.
    most : float
        Columns that fit the sliding window.
    scaling, softcap
        For the kernel.
    """

    identity: Identity
    names: tuple[str, ...]
    watched: tuple[tuple[str, Any], ...]
    shape: torch.Size
    dtype: torch.dtype
    group: int
    most: float
    scaling: float | None
    softcap: float | None

    @classmethod
    def about(cls, call: Call, layer: MixKVQLayer) -> Agreement | None:
        """The agreement about a call that was served, or None if there can be none."""
        given, query, store, proof = call.arguments, call.query, layer.store, layer.proof
        watched = tuple((name, value) for name, value in given.items() if name not in POSITIONS)
        if (
            store is None
            or proof is None
            or proof.sinks
            or store.padding
            or call.mask is not None
            or query.shape[2] != 1
            or not all(value is None or isinstance(value, (bool, int, float, str)) for _, value in watched)
        ):
            return None
        window = given.get("sliding_window")
        return cls(
            identity=proof.identity,
            names=tuple(given),
            watched=watched,
            shape=query.shape,
            dtype=query.dtype,
            group=query.shape[1] // store.k.shape[1],
            most=float("inf") if window is None or window == proof.window else window,
            scaling=given.get("scaling"),
            softcap=given["softcap"] if proof.softcap else None,
        )

    def covers(self, function: Attention, query: torch.Tensor, arguments: dict[str, Any]) -> bool:
        """Whether a call without a mask asks for the same."""
        if (
            query.shape != self.shape
            or query.dtype is not self.dtype
            or tuple(arguments) != self.names
            or not self.identity.of(function)
            or (query.requires_grad and torch.is_grad_enabled())
            or compat.attention_weights_wanted()
        ):
            return False
        for name, value in self.watched:
            given = arguments[name]
            if given is not value and (type(given) is not type(value) or given != value):
                return False
        return True


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
    _, query, key, value, mask = args
    layer = key.layer
    agreement = layer.agreement
    if (
        agreement is None
        or mask is not None
        or type(value) is not PackedHandle
        or value.layer is not layer
        or key.which != KEYS
        or value.which != VALUES
        or key.epoch != layer.epoch
        or layer.length > agreement.most
        or not agreement.covers(function, query, arguments)
    ):
        return None
    return layer.attend(query, agreement)
