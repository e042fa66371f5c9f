"""Layers with a convolution or recurrent state (qwen3_next, jamba, zamba2): transformers' own, made on demand.

A cache that was made without a configuration learns which layers these are when the model touches their states, which
may come before or after the layer's keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.compiler import is_compiling

from . import compat
from .guard import exclusive
from .layer import MixKVQLayer
from .passes import Passes
from .report import tensors_in

F = TypeVar("F", bound=Callable[..., Any])
LATE_STATES = ("conv_kernel_size", "max_batch_size")
"""Attributes that some versions of transformers set with the first state."""

LINEAR_STATES = tuple(
    name
    for name in dict.fromkeys((*(vars(compat.LinearLayer()) if compat.LinearLayer is not None else ()), *LATE_STATES))
    if name not in ("dtype", "device", "record_past")
)
"""Attributes by which a layer has a linear state."""

if compat.HybridLayer is not None:

    class MixKVQHybridLayer(compat.HybridLayer, MixKVQLayer):  # type: ignore[misc]
        """A layer with both kinds of state. transformers' class calls `DynamicLayer` by name: all is spelled out."""

        is_croppable = compat.LinearMixin.__dict__.get("is_croppable", True)

        def __init__(
            self, config: Any = None, ledger: Any = None, precision: str = "default", number_of_states: int = 1
        ) -> None:
            self.conv_states = self.recurrent_states = None
            MixKVQLayer.__init__(self, config, ledger, precision)
            compat.LinearLayer.__init__(self, **compat.state_arguments(number_of_states))

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            if args:
                MixKVQLayer.lazy_initialization(self, *args)
            else:
                compat.LinearLayer.lazy_initialization(self, **kwargs)

        def reset(self) -> None:
            MixKVQLayer.reset(self)
            compat.LinearLayer.reset(self)

        def crop(self, tokens_to_remove: Any) -> None:
            if next(iter(tensors_in([self.conv_states, self.recurrent_states])), None) is not None:
                compat.LinearLayer.crop(self, tokens_to_remove)  # this one may refuse
            MixKVQLayer.crop(self, tokens_to_remove)

        reorder_cache = MixKVQLayer.reorder_cache

        def _gather(self, rows: torch.Tensor) -> None:
            """Rows of keys, values and states; transformers' class forgets the states when rows are selected."""
            MixKVQLayer._gather(self, rows)
            state = next(iter(tensors_in([self.conv_states, self.recurrent_states])), None)
            if state is not None:
                compat.LinearLayer.reorder_cache(self, rows.to(torch.int64) % len(state))

        def tensors(self) -> list[torch.Tensor]:
            return [*MixKVQLayer.tensors(self), *tensors_in([self.conv_states, self.recurrent_states])]

        offload = MixKVQLayer.offload
        prefetch = MixKVQLayer.prefetch
        activate_past_recording = MixKVQLayer.activate_past_recording


def move_states(old: Any, new: Any) -> None:
    """Give a layer the linear states of another, which has none then."""
    for name, nothing in vars(compat.LinearLayer()).items():
        if name in vars(old):
            setattr(new, name, getattr(old, name))
            setattr(old, name, nothing)


def _exclusive(method: F) -> F:
    """As `guard.exclusive`, but in the graph of a compiled model."""
    alone = exclusive(method)

    @functools.wraps(method)
    def either(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs) if is_compiling() else alone(*args, **kwargs)

    return cast("F", either)


class LinearStates(Passes):
    """The part of a cache that serves linear and indexed layers; `MixKVQCache` has the rest."""

    def _new_layer(self, index: int) -> MixKVQLayer:
        raise NotImplementedError

    def _account_foreign(self, index: int) -> None:
        raise NotImplementedError

    def _is_linear(self, layer_idx: int) -> bool:
        return (
            compat.LinearMixin is not None
            and layer_idx < len(self.layers)
            and isinstance(self.layers[layer_idx], compat.LinearMixin)
        )

    def _has_state(self, layer_idx: int, state_idx: int) -> bool:
        return self._is_linear(layer_idx) and state_idx < getattr(self.layers[layer_idx], "number_of_states", 1)

    def _to_hybrid(self, layer_idx: int, number_of_states: int) -> None:
        """Give the layer both kinds of state and keep what it has."""
        old = self.layers[layer_idx]
        fresh = self._new_layer(layer_idx)
        new = MixKVQHybridLayer(fresh.mixkvq_config, fresh.ledger, fresh.precision, number_of_states)
        new.index, new.placement = layer_idx, fresh.placement
        keep = dict(vars(old))
        if not isinstance(old, MixKVQLayer):  # dtype and device are those of keys and values, which come now
            keep = {name: value for name, value in keep.items() if name not in ("dtype", "device", "is_initialized")}
        new.__dict__.update(keep)
        self.layers[layer_idx] = new

    def _linear_layer(self, layer_idx: int, state_idx: int) -> None:
        """Make sure that this layer can hold a linear state."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        have: Any = self.layers[layer_idx]
        if not isinstance(have, compat.LinearMixin):
            if have.get_seq_length():
                self._to_hybrid(layer_idx, state_idx + 1)
            else:  # exactly this class: a hybrid would be asked for mask sizes
                new = compat.LinearLayer(**compat.state_arguments(state_idx + 1))
                if hasattr(new, "record_past"):  # not in old transformers
                    new.record_past = getattr(have, "record_past", False)
                self.layers[layer_idx] = new
        compat.ensure_states(self.layers[layer_idx], state_idx + 1)

    @_exclusive
    def update_conv_state(self, conv_states: Any, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Any:
        """As in `Cache`."""
        self._check_state(layer_idx, "conv", state_idx)
        self._linear_layer(layer_idx, state_idx)
        index = {"state_idx": state_idx} if state_idx else {}
        state = super().update_conv_state(conv_states, layer_idx, **index, **kwargs)
        self._changed_state(layer_idx, "conv", state_idx)
        return state

    @_exclusive
    def update_recurrent_state(self, recurrent_states: Any, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Any:
        """As in `Cache`."""
        self._check_state(layer_idx, "recurrent", state_idx)
        self._linear_layer(layer_idx, state_idx)
        index = {"state_idx": state_idx} if state_idx else {}
        state = super().update_recurrent_state(recurrent_states, layer_idx, **index, **kwargs)
        self._changed_state(layer_idx, "recurrent", state_idx)
        return state

    @_exclusive
    def update_indexer(self, indexer_key_states: Any, layer_idx: int) -> Any:
        """As in `Cache`: the keys by which sparse attention chooses tokens. Such a layer stays transformers' own."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        have: Any = self.layers[layer_idx]
        if isinstance(have, MixKVQLayer):
            self.layers[layer_idx] = new = compat.IndexedLayer()
            if have.length:
                with torch.enable_grad():  # indexers run without, keys and values may have gradients
                    new.update(have.keys, have.values)
            have.reset()  # its bytes leave the ledger
            self._account_foreign(layer_idx)
        return super().update_indexer(indexer_key_states, layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """As in `Cache`; None for a state that does not exist yet."""
        return super().get_conv_state(layer_idx, state_idx) if self._has_state(layer_idx, state_idx) else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """As in `Cache`; None for a state that does not exist yet."""
        return super().get_recurrent_state(layer_idx, state_idx) if self._has_state(layer_idx, state_idx) else None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """As in `Cache`; False while there is no linear layer."""
        if layer_idx is None:
            known = any(map(self._is_linear, range(len(self.layers))))
        else:
            known = self._has_state(layer_idx, state_idx or 0)
        if not known:
            return False
        return bool(super().has_previous_state(layer_idx, *(() if state_idx is None else (state_idx,))))

    def is_recording_past(self, layer_idx: int) -> bool:
        """As in `Cache`; False for a layer that does not exist yet."""
        return layer_idx < len(self.layers) and bool(getattr(self.layers[layer_idx], "record_past", False))
