"""Every branch on the version of transformers (4.57 to 5.24 are known) lives here.

transformers below 5.1 looks attention functions up with ``AttentionInterface[...]`` only, which eager attention never
asks: eager models take the dequantized path there. Classes that a version lacks are None.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import cache_utils

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

_CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"  # the older name still works, with a warning


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which models and `generate` take a cache."""
    return {_CACHE: cache}


LinearMixin: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
"""Base of layers with a convolution or recurrent state."""

LinearLayer: Any = getattr(cache_utils, "LinearAttentionLayer", None)

HybridLayer: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
"""A layer with both a linear state and keys and values."""

try:  # models that record attention weights by hooks, not by an argument (5.x)
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None  # type: ignore[assignment]


def attention_lookup() -> tuple[type, str]:
    """Class and method by which an attention module finds its attention function."""
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface, "get_interface" if hasattr(AttentionInterface, "get_interface") else "__getitem__"


def look_up() -> Any:
    """Look an attention function up, as a module does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _, name = attention_lookup()
    arguments = ("eager", look_up) if name == "get_interface" else ("sdpa",)
    return getattr(ALL_ATTENTION_FUNCTIONS, name)(*arguments)


def attention_weights_wanted() -> bool:
    """Whether somebody collects attention weights, which no fused kernel returns."""
    if _collector is None:
        return False
    collected = _collector.get()  # type: ignore[no-untyped-call]
    return collected is not None and any("attention" in name for name in collected)


def hf_layout(config: Any) -> list[Any]:
    """The layers that `DynamicCache` makes for a model: stable over versions, unlike the functions behind it.

    Raises
    ------
    TypeError
        If ``config`` is not the configuration of a model.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config is {config!r}, must be a model's configuration, such as model.config")
    return list(cache_utils.DynamicCache(config=config.get_text_config(decoder=True)).layers)


def crop_target(length: int, argument: Any) -> int:
    """Tokens that ``crop(argument)`` leaves of ``length``.

    From 5.15 on the argument is the negative number of tokens to remove, before it was the new length, or negative.

    Raises
    ------
    ValueError
        For a positive argument where the version takes none.
    """
    number = int(argument)
    if VERSION >= (5, 15):
        if number > 0:
            raise ValueError(f"crop({number}): must be negative, the number of tokens to remove from the end")
        return max(length + number, 0)
    if number == 0 and VERSION >= (5, 14):
        return length
    return max(length + number, 0) if number < 0 else min(number, length)


def query_length(argument: Any) -> int:
    """Number of queries from the argument of ``get_mask_sizes``: an int, or the positions of the queries (4.57)."""
    return argument if isinstance(argument, int) else int(argument.shape[0])


def state_arguments(number_of_states: int) -> dict[str, int]:
    """Arguments of `LinearLayer` for this many states; one layer has exactly one before 5.14."""
    return {"number_of_states": number_of_states} if VERSION >= (5, 14) else {}


def ensure_states(layer: Any, number_of_states: int) -> None:
    """Give a linear layer room for more states, when no configuration told how many it has."""
    while getattr(layer, "number_of_states", number_of_states) < number_of_states:
        new = layer.number_of_states
        layer.number_of_states += 1
        for name in ("conv_states", "recurrent_states", "conv_kernel_size"):
            getattr(layer, name)[new] = None
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
            getattr(layer, name)[new] = False
