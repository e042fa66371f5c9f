"""Bytes: of a cache, of the process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


def tensors_held(thing: Any) -> Iterator[Any]:
    """Plain tensors in a tensor, container or object attribute, whatever it is wrapped in.

    A quantized tensor (a tensor subclass that names its parts in ``__tensor_flatten__``, as quanto's) gives its codes,
    scales and zero points.
    """
    import torch

    if isinstance(thing, torch.Tensor):
        parts = getattr(thing, "__tensor_flatten__", None)
        if type(thing) is torch.Tensor or parts is None:
            yield thing
        else:
            for name in parts()[0]:
                yield from tensors_held(getattr(thing, name))
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_held(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_held(value)


def nbytes_held(thing: Any) -> int:
    """Bytes of all plain tensors in something, see `tensors_held`."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors_held(thing)}.values())


def cache_nbytes(cache: Any) -> int:
    """Bytes that a cache holds: ``report().nbytes`` of a `MixKVQCache`, else all tensors of its layers."""
    if hasattr(cache, "report"):
        return int(cache.report().nbytes)
    return sum(nbytes_held(vars(layer)) for layer in cache.layers)


class CodedLayer(NamedTuple):
    """What one layer of any cache has coded."""

    path: str
    """As in `mixkvq.report.LayerReport`; "simulated"; "quantized" for transformers' quantized layers."""
    nbytes: int
    """Of what is coded, metadata included."""
    elements: int
    """Numbers that are coded; 0 where nothing is."""


def coded_layers(cache: Any) -> list[CodedLayer]:
    """Path and coded bytes of every layer of a cache, counted from what it holds."""
    if hasattr(cache, "report"):
        return [CodedLayer(x.path, x.record_bytes, x.record_elements) for x in cache.report().layers]
    layers = []
    for layer in cache.layers:
        coded = [getattr(layer, name, None) for name in ("_quantized_keys", "_quantized_values")]
        elements = sum(_elements(states) for states in coded)
        layers.append(CodedLayer("quantized" if elements else "native", nbytes_held(coded), elements))
    return layers


def _elements(states: Any) -> int:
    """Numbers in a quantized tensor: a tensor subclass (quanto), or codes and a dict with their shape (hqq)."""
    if states is None:
        return 0
    return math.prod(states[1]["shape"]) if isinstance(states, tuple) else int(states.numel())


def exact_elements(cache: Any) -> int:
    """Numbers in the full-precision keys and values of transformers' own layers."""
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(t.numel() for t in states if t is not None)


def bf16_nbytes(config: Any, tokens: int) -> int:
    """Bytes of a bf16 `DynamicCache` of full-attention layers that holds `tokens` tokens of one sequence."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * int(text.num_hidden_layers) * int(heads) * int(head_dim) * tokens


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class PeakMemory:
    """Highest resident memory of this process since `start`, less what was resident then.

    The kernel keeps the mark (``VmHWM``), so nothing is missed between samples. Where it cannot be reset (not Linux, or
    a sandbox without ``/proc/self/clear_refs``) `extra` is None: better no number than one that includes loading.
    """

    def __init__(self) -> None:
        self._before: int | None = None

    def start(self) -> None:
        """Reset the mark to what is resident now."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return
        self._before = _status("VmRSS")

    @property
    def extra(self) -> int | None:
        """Bytes above the start, or None where the system does not tell."""
        peak = _status("VmHWM")
        return None if self._before is None or peak is None else max(0, peak - self._before)
