"""Every branch on the version of transformers lives here; docs/versions.md says what was tried on which.

Classes that a version lacks are None.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version

OLDEST, FULL, NEWEST = (4, 57), (5, 8), (5, 24)
"""Minor versions of transformers: the oldest that works at all, the oldest with everything, the newest tried."""

VERSION = Version(transformers.__version__).release[:2]

if VERSION < OLDEST:
    raise ImportError(
        f"mixkvq needs transformers >= {OLDEST[0]}.{OLDEST[1]}, and {transformers.__version__} is installed: "
        f"pip install -U 'transformers>={FULL[0]}.{FULL[1]}'"
    )

from transformers import cache_utils  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402

_CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"  # the older name still works, with a warning

_lock = threading.Lock()
_warned = False


def warn_if_unknown() -> None:
    """Say, once per process, that a transformers newer than `NEWEST` was not tried."""
    global _warned
    if VERSION <= NEWEST or _warned:
        return
    with _lock:
        warned, _warned = _warned, True
    if not warned:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than {NEWEST[0]}.{NEWEST[1]}, the newest that this "
            "mixkvq was tried with: look for a newer mixkvq, or compare with DynamicCache once; cache.report() says "
            "which layers are packed",
            stacklevel=3,
        )


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which models and `generate` take a cache."""
    return {_CACHE: cache}


def gguf_arguments() -> dict[str, Any]:
    """Arguments of `from_pretrained` that unpack the weights of a GGUF file, which newer versions may keep packed."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


RUNS_WITHOUT_NUMBERS = VERSION >= (5, 0)
"""Whether models run on torch's meta device; before, rotary embeddings asked it for autocast, which it has not."""


LinearMixin: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
"""Base of layers with a convolution or recurrent state."""

LinearLayer: Any = getattr(cache_utils, "LinearAttentionLayer", None)

DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)
"""A layer that holds nothing: its module reads the keys and values of an earlier one."""

IndexedLayer: Any = getattr(cache_utils, "DynamicIndexedLayer", None)
"""A layer that also caches the keys of a sparse attention's indexer."""

HybridLayer: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
"""A layer with both a linear state and keys and values."""


def layer_classes() -> dict[str, Any]:
    """Layers of transformers' own that a model may be laid out with, by name."""
    names = (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "DynamicIndexedLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    )
    return {name: getattr(cache_utils, name) for name in names if hasattr(cache_utils, name)}


try:  # models that record attention weights by hooks, not by an argument (5.x)
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None  # type: ignore[assignment]


SEES_EAGER = hasattr(AttentionInterface, "get_interface")
"""Whether eager attention is looked up, too (5.1). Before, a model with eager attention took the dequantized path."""


ATTENTION_FUNCTIONS: Any = ALL_ATTENTION_FUNCTIONS
"""The one instance that models use."""

LOOKUPS = ("get_interface",) if SEES_EAGER else ("__getitem__",)
"""Methods of `AttentionInterface` by which attention modules look their function up. Where there is the first, the
second stays as it is: a subscript gives the very function that was registered, and look-ups cost 0.3 us less."""


def attention_lookup() -> tuple[type, str]:
    """Class and method by which an attention module finds its attention function."""
    return AttentionInterface, LOOKUPS[0]


def attention_function(name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """The function that an attention module finds for the implementation ``name``; ``eager`` is its own."""
    functions = ATTENTION_FUNCTIONS
    if SEES_EAGER:
        found: Callable[..., Any] = functions.get_interface(name, eager)
    else:
        found = eager if name == "eager" else functions[name]
    return found


def look_up(name: str) -> Any:
    """Look an attention function up by one of `LOOKUPS`."""
    if name == "__getitem__":
        return ATTENTION_FUNCTIONS["sdpa"]
    return getattr(ATTENTION_FUNCTIONS, name)("eager", look_up)


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

    A negative argument is the number of tokens to remove. A positive one is the new length, and an error from 5.20 on;
    0 is a length too before 5.14, then nothing to remove.

    Raises
    ------
    ValueError
        For a positive argument where the version takes none.
    """
    number = int(argument)
    if number < 0:
        return max(length + number, 0)
    if number == 0:
        return length if VERSION >= (5, 14) else 0
    if VERSION >= (5, 20):
        raise ValueError(f"crop({number}): must be negative, the number of tokens to remove from the end")
    return min(number, length)


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
