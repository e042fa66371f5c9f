"""Models spread over processes by transformers (``DistributedConfig``): what a cache refuses, before the first forward.

Under tensor parallelism a process has whole KV heads of every layer, under pipeline parallelism whole layers. All state
of a cache belongs to one head of one layer, and its bytes depend on nothing else, so no process needs to hear of the
others. The exception is ``allocate="layer"``, which shares one budget among the KV heads of a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_BY_OUTPUT = ("colwise", "packed_colwise", "local_colwise")  # styles that leave every process its part of the output
_FRAMES = 24


def check_tensor_parallel(model_or_config: Any, allocate: Iterable[str] = ()) -> None:
    """Refuse a model whose KV heads cannot be spread over its processes.

    Parameters
    ----------
    model_or_config : transformers.PreTrainedModel or PreTrainedConfig
        As `from_pretrained` made it with ``distributed_config=``; anything else passes.
    allocate : iterable of str
        How layers of the cache choose the bits of key channels (`MixKVQConfig.allocate`).

    Raises
    ------
    ValueError
        If ``num_key_value_heads % tp_size != 0``, or a budget would be shared by heads of several processes.
    """
    config = getattr(model_or_config, "config", model_or_config)
    size = _tp_size(model_or_config, config)
    if size == 1 or not _spreads_heads(_plan(model_or_config, config)):
        return
    for heads in _kv_heads(config):
        if heads % size:
            allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"num_key_value_heads is {heads} and tp_size is {size}: every process must hold whole KV heads, so "
                f"tp_size must be one of {allowed}, as in DistributedConfig(tp_size={_closest(heads, size)})"
            )
    if "layer" in allocate:
        raise ValueError(
            f"allocate is 'layer' and tp_size is {size}: one budget for all KV heads of a layer, of which every "
            "process holds only some; use allocate='budget', which gives every head its own"
        )


def _closest(heads: int, size: int) -> int:
    """The largest allowed number of processes below the one asked for."""
    return next(n for n in range(min(heads, size), 0, -1) if heads % n == 0)


def _tp_size(model: Any, config: Any) -> int:
    distributed = getattr(config, "distributed_config", None)
    size = getattr(distributed, "tp_size", None)
    if size is None and isinstance(distributed, Mapping):
        size = distributed.get("tp_size")
    return int(size or getattr(model, "_tp_size", None) or 1)


def _plan(model: Any, config: Any) -> Mapping[str, str]:
    """Which modules are spread, and how."""
    if isinstance(plan := getattr(model, "tp_plan", None), Mapping):  # of a model: with all that was asked for
        return plan
    base: Mapping[str, str] = getattr(_text(config), "base_model_tp_plan", None) or {}
    changes = getattr(getattr(config, "distributed_config", None), "tp_plan", None)
    if not isinstance(changes, Mapping):
        return base
    return {**base, **changes} if changes else {}


def _spreads_heads(plan: Mapping[str, str]) -> bool:
    return any(name.rpartition(".")[2] in _KEY_PROJECTIONS and style in _BY_OUTPUT for name, style in plan.items())


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _kv_heads(config: Any) -> list[int]:
    """Numbers of KV heads that layers of the model have."""
    text = _text(config)
    layers = getattr(text, "per_layer_config", None) or [text]
    found = {getattr(c, "num_key_value_heads", None) or getattr(c, "num_attention_heads", None) for c in layers}
    return sorted(heads for heads in found if isinstance(heads, int))


# ---- which model asks ----------------------------------------------------------------------------------------------
def several_processes() -> bool:
    """Whether this process is one of several that work together."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def asking_config() -> Any:
    """Configuration of the distributed model whose `generate` or `forward` is running; None if there is none.

    A cache that was made without a model learns of it in the first attention call, which is too late: keys that are no
    whole heads fail before it. But models ask a cache for its length first, and the one that asks is on the stack.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        module = frame.f_locals.get("self")
        config = getattr(module, "config", None) if isinstance(module, torch.nn.Module) else None
        if getattr(config, "distributed_config", None) is not None:
            return config
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
