"""`PackedHandle`: what a packed layer hands to the model in place of keys or values: a shape without storage.

The attention hook recognises a pair of handles and runs the fused kernel. Every other operation decodes the whole layer
first: slow, never wrong.
"""

from __future__ import annotations

from sys import getrefcount
from typing import TYPE_CHECKING, Any
from weakref import getweakrefcount

import torch
from torch.utils._pytree import tree_map_only

from . import lookup, reasons

if TYPE_CHECKING:
    from .layer import MixKVQLayer

KEYS, VALUES = 0, 1


class PackedHandle(torch.Tensor):
    """Keys or values [B, H, N, D] of a packed layer, decoded when somebody computes with them.

    A handle reads what its layer holds at the moment of use; after an update, a crop or a reordering it is stale.
    """

    layer: MixKVQLayer
    which: int
    epoch: int
    seen = False  # by an operator

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def check(self) -> None:
        """Raise RuntimeError if the layer changed since this handle was made."""
        if self.layer.epoch != self.epoch:
            raise RuntimeError(
                "stale keys or values of a MixKVQCache: their layer was updated, cropped or reordered since. "
                "Ask the layer again: cache.layers[i].keys"
            )

    def decode(self) -> torch.Tensor:
        """The decoded tensor."""
        self.seen = True
        self.check()
        return self.layer.decode()[self.which]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(
                    f"{func} writes into the keys or values of a packed MixKVQCache, which are read-only"
                )
        layers: list[MixKVQLayer] = []

        def decode(handle: PackedHandle) -> torch.Tensor:
            layers.append(handle.layer)
            return handle.decode()

        args, kwargs = tree_map_only(cls, decode, (args, kwargs))
        result = func(*args, **kwargs)
        if layers:  # last: under -W error a warning is an exception
            layers[0].served_decoded(lookup.blindness(otherwise=reasons.operator(func)))
        return result

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"PackedHandle({'keys' if self.which == KEYS else 'values'}, shape={tuple(self.shape)}, dtype={self.dtype})"
        )


_make = torch.Tensor._make_wrapper_subclass


def _references(pair: tuple[object, object]) -> int:
    """References to both, as the interpreter counts them."""
    return getrefcount(pair[0]) + getrefcount(pair[1])


_ALONE = _references((object(), object()))
"""What a pair has that nobody else refers to; how many that are depends on the interpreter."""


def _wanted(pair: tuple[PackedHandle, PackedHandle]) -> bool:
    """Whether an operator has seen a handle of the pair, or somebody watches it."""
    keys, values = pair
    return keys.seen or values.seen or getweakrefcount(keys) > 0 or getweakrefcount(values) > 0


class Handles:
    """Gives out the handles of one cache.

    A pair that nobody has any more is given out again, for another layer or step: not while somebody refers to it, and
    never after an operator has seen it (autograd may keep it where no reference shows).
    """

    def __init__(self) -> None:
        self._pair: tuple[PackedHandle, PackedHandle] | None = None
        self._like: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[type[Handles], tuple[()]]:
        return Handles, ()

    def give(self, layer: MixKVQLayer, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[PackedHandle, PackedHandle]:
        """Keys and values of what a packed layer holds now.

        Parameters
        ----------
        layer : MixKVQLayer
        shape : tuple of int
            [B, H, N, D].
        dtype : torch.dtype
        """
        pair, like = self._pair, (shape, dtype, layer.device)
        if pair is None or like != self._like or _references(pair) > _ALONE or _wanted(pair):
            # class, sizes, strides, storage offset, memory format, dtype, layout, device: faster by position
            arguments = PackedHandle, shape, None, None, None, dtype, torch.strided, layer.device
            self._pair, self._like = pair, _ = (_make(*arguments), _make(*arguments)), like
            pair[0].which, pair[1].which = KEYS, VALUES
        keys, values = pair
        keys.layer = values.layer = layer
        keys.epoch = values.epoch = layer.epoch
        return keys, values  # another tuple: it may be kept
