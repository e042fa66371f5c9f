"""`Prefill`: the exact first forward pass of a text, run once and replayed into any number of caches.

In the first pass over a prompt attention sees exact keys and values whatever the cache does with them afterwards, so
every cache gets the same queries, keys and values. `Prefill` keeps the attention calls of that pass; a replay hands
them to an empty cache layer by layer, through the attention hook, as the model would, without running the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .. import compat
from ..compat import cache_argument
from ..hook import TAG, unwrapped, wrap


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention over a prompt."""

    layer: int
    function: Callable[..., Any]
    module: Any
    query: torch.Tensor
    """[B, Q, n, D] after RoPE"""
    key: torch.Tensor
    """[B, H, n, D] after RoPE"""
    value: torch.Tensor
    rest: tuple[Any, ...]
    """Positional arguments behind the values: the mask."""
    arguments: dict[str, Any]
    result: Any

    def replay(self, cache: Any) -> None:
        """Let a cache see the call."""

        def attention(module: Any, query: Any, *rest: Any, **kwargs: Any) -> Any:
            if query is self.query:
                return self.result
            return self.function(module, query, *rest, **kwargs)  # the proof tries other queries

        key, value = cache.update(self.key, self.value, self.layer)
        wrap(attention, unwrapped(self.function))(self.module, self.query, key, value, *self.rest, **self.arguments)


@dataclass(frozen=True)
class Prefill:
    """All attention calls of the first pass over a prompt. Make it with `record`."""

    tokens: int
    calls: list[AttentionCall]
    logits: torch.Tensor
    """[B, 1, vocabulary] of the last token."""

    @classmethod
    def record(cls, model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Prefill:
        """Run a model over ``ids`` [B, n] with an exact cache.

        ``mask`` [B, n] is 0 at padding on the left; positions are counted behind it, as ``generate`` does.

        Raises
        ------
        ValueError
            If a layer's attention does not pass through transformers' AttentionInterface.
        """
        cache = _IndexingCache(config=model.config)
        calls: list[AttentionCall] = []
        with torch.inference_mode(), _recording(calls):
            logits = read(model, ids, mask, cache)
        seen = {call.layer for call in calls}
        missing = [i for i in range(len(cache.layers)) if i not in seen]
        if missing:
            raise ValueError(f"model is {type(model).__name__}: attention of layers {missing} cannot be observed")
        return cls(ids.shape[1], calls, logits)

    def replay(self, cache: Any) -> None:
        """Fill an empty cache as the model would have filled it."""
        for call in self.calls:
            call.replay(cache)


def read(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
    """Run a model over ``ids`` [B, n] as `Prefill.record` does; the logits [B, 1, vocabulary] of the last token."""
    padded: dict[str, Any] = {}
    if mask is not None:
        padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    logits: torch.Tensor = model(ids, **cache_argument(cache), logits_to_keep=1, **padded).logits
    return logits


_LAYER = "_mixkvq_layer"


class _IndexingCache(DynamicCache):
    """Marks the keys it hands out with their layer."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys = keys.view_as(keys)
        setattr(keys, _LAYER, (layer_idx, key_states, value_states))
        return keys, values


@contextmanager
def _recording(calls: list[AttentionCall]) -> Iterator[None]:
    owner, name = compat.attention_lookup()
    original, owned = getattr(owner, name), owner.__dict__.get(name)

    @functools.wraps(original)
    def lookup(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = original(self, *args, **kwargs)

        @functools.wraps(function)
        def attention(module: Any, query: Any, key: Any, value: Any, *rest: Any, **arguments: Any) -> Any:
            result = function(module, query, key, value, *rest, **arguments)
            mark = getattr(key, _LAYER, None)
            if mark is not None and getattr(key, TAG, None) is None:
                layer, new_key, new_value = mark
                calls.append(AttentionCall(layer, function, module, query, new_key, new_value, rest, arguments, result))
            return result

        return attention

    setattr(owner, name, lookup)
    try:
        yield
    finally:
        if owned is None:
            delattr(owner, name)
        else:
            setattr(owner, name, owned)
