"""Which keys, values and states a model caches, found by running its code without any numbers.

The model is built from its configuration on torch's meta device, where tensors have shapes and dtypes but no memory,
and reads a few tokens with transformers' own cache: every architecture tells its layers itself, no weight is loaded.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutput

from . import compat
from .report import tensors_in

_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq")
_AUTO_WITH_ENCODER = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText")
_PROMPT = 64
"""Tokens that are enough to see shapes."""


class States(NamedTuple):
    """Keys or values of one layer, for one row."""

    heads: int
    dim: int
    dtype: torch.dtype

    def tokens(self, count: int, batch: int = 1, device: str = "meta") -> torch.Tensor:
        """[batch, heads, count, dim]: without memory, or on another device one number that stands for all."""
        shape = (batch, self.heads, count, self.dim)
        if device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.zeros(1, dtype=self.dtype, device=device).expand(shape)


class CachedLayer(NamedTuple):
    """What a model caches in one layer.

    Attributes
    ----------
    kind : type
        Class of the layer that transformers makes.
    keys, values : States or None
        None: the layer has no keys and values, or keeps them in a way of its own.
    besides : int
        Bytes of everything else for one row: linear states; all of a layer that keeps keys in a way of its own.
    elements : int
        Elements of that.
    """

    kind: type
    keys: States | None
    values: States | None
    besides: int
    elements: int


def cached_layers(config: Any, dtype: torch.dtype, tokens: int) -> tuple[CachedLayer, ...]:
    """What a model of this configuration caches, layer by layer, after a prompt and one token more.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    dtype : torch.dtype
        Of the weights.
    tokens : int
        Read in all.

    Raises
    ------
    TypeError
        If ``config`` is not the configuration of a model.
    ValueError
        If the model cannot run without numbers.
    ImportError
        If no model of the installed transformers can.
    """
    if not compat.RUNS_WITHOUT_NUMBERS:
        raise ImportError(
            f"shapes of a model's cache need transformers >= 5.0, and {transformers.__version__} is installed"
        )
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config is {config!r}, must be a model's configuration, such as model.config")
    key = _Key(config)
    layers = _read(key, dtype, _PROMPT)
    return layers if all(layer.kind in _STANDARD for layer in layers) else _read(key, dtype, tokens)


class _Key:
    """A configuration that is looked up by what it says."""

    def __init__(self, config: Any) -> None:
        self.config, self.text = copy.deepcopy(config), f"{type(config)} {config.to_json_string(use_diff=False)}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.lru_cache(maxsize=64)
def _read(key: _Key, dtype: torch.dtype, tokens: int) -> tuple[CachedLayer, ...]:
    """The layers of transformers' own cache, of one row, after this many tokens, the last one alone."""
    config = key.config
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"  # the others look at numbers, or take no float32 on this device
    try:
        with torch.device("meta"):
            make = model_class(config)
            model = (make.from_config if hasattr(make, "from_config") else make._from_config)(config, dtype=dtype)
        cache = _cache_of(model.eval(), config, [count for count in (tokens - 1, 1) if count])
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"config is a {type(config).__name__}, must be of a model whose code runs without numbers "
            f"({type(error).__name__}: {first})"
        ) from error
    return tuple(map(_describe, cache.layers))


def _cache_of(model: Any, config: Any, steps: list[int]) -> Any:
    """transformers' own cache after these numbers of tokens."""
    cache: Any = transformers.DynamicCache(config=config.get_text_config(decoder=True))
    given, name, inputs = cache, "input_ids", dict[str, Any]()
    if config.is_encoder_decoder:
        name, given = "decoder_input_ids", transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
        width = config.get_text_config(encoder=True).hidden_size
        inputs["encoder_outputs"] = _Encoded(torch.empty(1, 2, width, dtype=model.dtype, device="meta"))
    with torch.no_grad(), torch.device("meta"), _NoNumbers():  # type: ignore[no-untyped-call]
        for count in steps:
            ids = torch.zeros(1, count, dtype=torch.int64)
            model(**{name: ids}, **inputs, **compat.cache_argument(given), use_cache=True)
    return cache


class _Encoded(BaseModelOutput):
    """What an encoder gives; what some decoders ask for besides is None."""

    attention_mask = router_logits = None


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets code go on that looks at numbers: whether there is padding, which tokens go to which expert."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def _describe(layer: Any) -> CachedLayer:
    standard = type(layer) in _STANDARD
    keys, values = (_states(layer, name) if standard else None for name in ("keys", "values"))
    rest = {name: value for name, value in vars(layer).items() if not standard or name not in ("keys", "values")}
    held = [t for t in tensors_in(rest) if t.dim()]  # numbers about the layer do not grow with the batch
    known = [t for t in (rest.get("keys"), rest.get("values")) if t is not None] or held
    return CachedLayer(type(layer), keys, values, storage_bytes(held), sum(t.numel() for t in known))


_STANDARD = {
    kind
    for name in (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "DummyLayer",
    )
    if (kind := getattr(transformers.cache_utils, name, None)) is not None
}
"""Layers whose keys and values grow by one tensor each."""


def _states(layer: Any, name: str) -> States | None:
    tensor = getattr(layer, name, None)
    if tensor is None or tensor.dim() != 4:
        return None
    return States(tensor.shape[1], tensor.shape[3], tensor.dtype)


def storage_bytes(thing: Any) -> int:
    """As `report.held_bytes` of all tensors in something, which may have no memory."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors_in(thing))}.values())


def model_class(config: Any) -> Any:
    """The class that makes a model of this configuration that continues text: an auto class, or the model's own.

    Where there is none it is an auto class, which says so.
    """
    names = _AUTO_WITH_ENCODER if config.is_encoder_decoder else _AUTO
    autos = [getattr(transformers, name) for name in names]
    owns = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = [auto for auto in autos if type(config) in auto._model_mapping]
    return next(iter([*known, *(own for own in owns if hasattr(own, "generate"))]), autos[0])
