"""Layers that transformers made, as JSON and tensors and back: sliding windows, linear states, indexers, nothing.

Their attributes are written one by one. What comes back is an object of one of these classes, made by its constructor,
and only attributes that it has are set, to values that belong together: later code sizes masks and buffers by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import compat
from .linear import LATE_STATES
from .strict_json import MAX_COUNT
from .tensorfile import DTYPES, NAMES

Put = Callable[[str, torch.Tensor], str]
Get = Callable[[str], torch.Tensor]
_LATER = ("dtype", "device", "indexer_dtype", "indexer_device", *LATE_STATES)
"""Attributes that a layer gets with its first tokens."""


# ---- to JSON -------------------------------------------------------------------------------------------------------
def encode(attributes: Mapping[str, Any], put: Put) -> dict[str, Any]:
    """Attributes as JSON.

    Parameters
    ----------
    attributes : mapping
    put : callable
        Given a name within the layer and a tensor, keeps it and gives the name to find it by.

    Raises
    ------
    ValueError
        Naming an attribute that a file cannot hold.
    """
    return {name: _encoded(name, value, put) for name, value in attributes.items()}


def _encoded(name: str, value: Any, put: Put) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dtype in NAMES:
        return {"tensor": put(name, value)}
    if isinstance(value, torch.dtype) and value in NAMES:
        return {"dtype": NAMES[value]}
    if isinstance(value, torch.device):
        return {"device": None}  # where the cache is loaded
    if type(value) is dict and all(type(key) is int for key in value):
        return {"map": [[key, _encoded(f"{name}.{key}", one, put)] for key, one in sorted(value.items())]}
    what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    raise ValueError(f"its {name} is a {what}, which a file cannot hold")


# ---- and back ------------------------------------------------------------------------------------------------------
def decode(layer: dict[str, Any], get: Get, device: torch.device) -> Any:
    """The layer that was encoded.

    Parameters
    ----------
    layer : dict
        ``{"class": name, "attributes": of encode}``.
    get : callable
        Gives the tensor of a name, once.
    device : torch.device

    Raises
    ------
    ValueError, TypeError, KeyError
        For what is none of these layers, or one whose values do not belong together.
    """
    known = compat.layer_classes()
    if layer["class"] not in known:
        raise ValueError(f"no layer {layer['class']!r:.80} in this version of transformers; known: {', '.join(known)}")
    cls = known[layer["class"]]
    values = decode_attributes(layer["attributes"], get, device)
    arguments = {}
    if "sliding_window" in values:
        arguments["sliding_window"] = _integer(values, "sliding_window", 1)
    if "number_of_states" in values:
        arguments["number_of_states"] = number_of_states(values)
    with device:  # some keep a number as a tensor
        made = cls(**arguments)
    assign(made, values, (*vars(made), *_LATER))
    check_linear(made)
    _check_tokens(made)
    return made


def decode_attributes(attributes: Mapping[str, Any], get: Get, device: torch.device) -> dict[str, Any]:
    """The values of `encode`."""
    return {name: _decoded(value, get, device) for name, value in attributes.items()}


def _decoded(value: Any, get: Get, device: torch.device) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list among its attributes")
        if type(value) is int and abs(value) > MAX_COUNT:
            raise ValueError(f"the number {value!r:.80} among its attributes")
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return get(inner)
    if kind == "dtype":
        return DTYPES[inner]
    if kind == "device":
        return device
    if kind == "map":
        found = {key: _decoded(one, get, device) for key, one in inner}
        if not all(type(key) is int for key in found):
            raise ValueError("a map with other keys than numbers")
        return found
    raise ValueError(f"a value of the kind {kind!r:.40}")


def assign(layer: Any, values: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Set attributes that the layer has, to values of their kind.

    Raises
    ------
    ValueError
        Naming the attribute.
    """
    for name, value in values.items():
        if name not in allowed:
            raise ValueError(f"{type(layer).__name__} has no {name!r:.80} in this version of transformers")
        have = vars(layer).get(name)
        if type(have) in (bool, int, dict) and type(value) is not type(have):
            raise ValueError(f"{name} is {value!r:.80}, must be of type {type(have).__name__}")
        if isinstance(have, torch.Tensor) and not _like(have, value):
            raise ValueError(f"{name} is {value!r:.80}, must be {have!r}")
        setattr(layer, name, value)


def _like(have: torch.Tensor, value: Any) -> bool:
    """Whether this is the tensor that the constructor made from a number."""
    return isinstance(value, torch.Tensor) and value.dtype == have.dtype and torch.equal(value, have)


def _integer(values: Mapping[str, Any], name: str, low: int) -> int:
    value = values.get(name)
    if type(value) is not int or value < low:
        raise ValueError(f"{name} is {value!r:.80}, must be a whole number from {low}")
    return value


def number_of_states(values: Mapping[str, Any]) -> int:
    """The number of linear states, of which each is there."""
    number, states = _integer(values, "number_of_states", 0), values.get("conv_states")
    if not isinstance(states, dict) or len(states) != number:
        raise ValueError(f"number_of_states is {number}, of which it has others")
    return number


def check_linear(layer: Any) -> None:
    """Refuse linear states that contradict what is said about them.

    Raises
    ------
    ValueError
        Naming them.
    """
    if compat.LinearMixin is None or not isinstance(layer, compat.LinearMixin):
        return
    states = layer.conv_states.keys() if isinstance(layer.conv_states, dict) else None
    for kind in ("conv", "recurrent"):
        tensors = _by_index(getattr(layer, f"{kind}_states"), states)
        ready = _by_index(getattr(layer, f"is_{kind}_states_initialized"), states)
        for index, tensor in tensors.items():
            if not (tensor is None or isinstance(tensor, torch.Tensor)) or ready[index] is not (tensor is not None):
                raise ValueError(f"{kind}_states[{index}] is there or not, and is said to be otherwise")
    flags = _by_index(layer.has_previous_state, states)
    widths = _by_index(getattr(layer, "conv_kernel_size", None), states)
    for index, tensor in _by_index(layer.conv_states, states).items():
        width, most = widths[index], 0 if tensor is None or tensor.dim() == 0 else tensor.shape[-1]
        if type(flags[index]) is not bool or not (
            width is None
            or (type(width) is int and (width == most or (getattr(layer, "record_past", False) and 0 < width <= most)))
        ):
            raise ValueError(f"conv_kernel_size[{index}] is {width!r:.80}, its state has {most}")
    if type(getattr(layer, "max_batch_size", 0)) is not int:
        raise ValueError(f"max_batch_size is {layer.max_batch_size!r:.80}, must be an int")


def _by_index(value: Any, states: Any) -> dict[Any, Any]:
    """Values by state; one layer has exactly one, and no dictionaries, before transformers 5.14."""
    if states is None:
        return {0: value}
    if not isinstance(value, dict):
        return dict.fromkeys(states, value)
    if value.keys() != states:
        raise ValueError("linear states of different numbers")
    return value


def _check_tokens(layer: Any) -> None:
    """Refuse keys and values that contradict their number, by which masks are made."""
    kinds: dict[str, type] = {"keys": torch.Tensor, "values": torch.Tensor, "indexer_keys": torch.Tensor}
    kinds |= {"indexer_position_ids": torch.Tensor, "dtype": torch.dtype, "indexer_dtype": torch.dtype}
    kinds |= {"device": torch.device, "indexer_device": torch.device}
    for name, kind in kinds.items():
        if not isinstance(getattr(layer, name, None), (kind, type(None))):
            raise ValueError(f"{name} is of another type than {kind.__name__}")
    for flag, name in (("is_initialized", "keys"), ("is_indexer_initialized", "indexer_keys")):
        ready = getattr(layer, flag, None)
        if ready is not None and ready is not (getattr(layer, name) is not None) and not _empty(layer):
            raise ValueError(f"{flag} is {ready!r:.80}, which contradicts its {name}")
    tokens, keys, values = 0, getattr(layer, "keys", None), getattr(layer, "values", None)
    if (keys is None) is not (values is None):
        raise ValueError("it has keys or values alone")
    if keys is not None and values is not None and not (keys.shape == values.shape == (0,)):  # as transformers begins
        if min(keys.dim(), values.dim()) < 3 or (len(keys), keys.shape[-2]) != (len(values), values.shape[-2]):
            raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} do not belong together")
        tokens = keys.shape[-2]
        floating = keys.is_floating_point() and values.is_floating_point()  # of two widths under autocast
        if not floating and keys.dtype != values.dtype:
            raise ValueError(f"keys are {keys.dtype}, values {values.dtype}")
    if window := getattr(layer, "sliding_window", None):
        seen = layer.cumulative_length
        least = min(seen, window - 1 or seen)
        if not (tokens == least or (getattr(layer, "record_past", False) and least <= tokens <= seen)):
            raise ValueError(f"{tokens} tokens in a window of {window} after {seen}")


def _empty(layer: Any) -> bool:
    return compat.DummyLayer is not None and type(layer) is compat.DummyLayer and layer.keys is None
