"""`MixKVQCache.load`: the cache of a file that `saving` wrote, or that somebody made to look like one.

The checksum finds damage. Against malice everything is checked besides: nothing is executed, no size is believed that
the tensors do not have, and records are checked as the kernels need them, which trust them later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from . import foreign, reasons, strict_json, tensorfile, torch_module
from .autograd import outside_autograd
from .calibration import MAX_LAYERS, Calibration, by_layer
from .config import MixKVQConfig
from .errors import CacheFileError
from .files import checked_path
from .fingerprint import ModelRecord
from .layer import DEQUANTIZED, NATIVE, PACKED, PLAIN, MixKVQLayer
from .linear import LINEAR_STATES
from .loading_store import restored_queries, restored_store
from .masks import NO_TOKEN
from .placement import Placement, placed
from .reasons import Reason
from .saving import FORMAT, HYBRID, OURS, VERSION
from .states import DTYPES, codec_of, common_dtype
from .strict_json import MAX_COUNT
from .tensorfile import DTYPES as TENSOR_DTYPES

if TYPE_CHECKING:
    from .cache import MixKVQCache

C = TypeVar("C", bound="MixKVQCache")
_MAX_TEXT = 2000  # characters of a reason


@dataclass(frozen=True)
class SavedFor:
    """The model that a cache from a file is for, until a model was seen.

    Attributes
    ----------
    path : str
    model : ModelRecord
    """

    path: str
    model: ModelRecord

    def check(self, config: Any) -> None:
        """Refuse another model.

        Raises
        ------
        TypeError
            If ``config`` is not the configuration of a model.
        CacheFileError
            Naming both fingerprints and what differs.
        """
        if config is None:
            raise CacheFileError(
                f"{self.path} is for {self.model.fingerprint}, and the model's attention does not tell its "
                "configuration: pass MixKVQCache.load(path, config=model.config)"
            )
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config is {config!r}, must be a model's configuration, such as model.config")
        found = ModelRecord.of(config)
        difference = self.model.difference(found)
        if difference or found.fingerprint != self.model.fingerprint:
            raise CacheFileError(
                f"{self.path} is for {self.model.fingerprint}, the model is {found.fingerprint}: its keys and values "
                f"would be wrong there. In the file and in the model: {difference or 'something that neither names'}"
            )


@outside_autograd
def load(cls: type[C], path: str | os.PathLike[str], config: Any, device: Any, offload: bool) -> C:
    """Read a cache; see `MixKVQCache.load`."""
    path, device, placement = checked_path(path), _checked_device(device), placed(offload)
    metadata, tensors, size = tensorfile.read(path, lambda metadata, names: _check_kind(path, metadata, names))
    if device.type != "cpu" and any(name.endswith(".records") for name in tensors):
        problem = torch_module.cuda_problem(device) if device.type == "cuda" else ("no kernels",)
        if problem is not None:
            raise ValueError(f"device is '{device}', must be 'cpu': {path} has packed layers ({'; '.join(problem)})")
    try:
        about = strict_json.parse(metadata["cache"])
        loader = _Loader(about, tensors, device, size)
        model = about["model"]
        if model is not None:
            model = ModelRecord(_text(model["fingerprint"]), _is(model["fields"], dict, "fields of the model"))
        cache = loader.cache(cls, placement)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise CacheFileError(
            f"{path} has a right checksum, but is no cache that this mixkvq can have written ({error!r:.500})"
        ) from error
    cache.model_record = model
    cache._saved_for = None if model is None else SavedFor(str(path), model)
    if config is not None:
        cache._take_config(config)
    return cache


def _checked_device(device: Any) -> torch.device:
    """A device that is there and holds numbers."""
    try:
        here = torch.zeros(1, device=torch.device(device))
        here.item()  # not on "meta"
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device is {str(device)!r}, must be one that is there, such as 'cpu' ({reason})") from None
    return here.device  # with its index


def _check_kind(path: Path, metadata: dict[str, str], names: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CacheFileError(
            f"{path} is a safetensors file of something else than a MixKVQCache (it has tensors such as "
            f"{', '.join(names[:3])!r:.200}): pass what MixKVQCache.save wrote"
        )
    version = metadata.get("version", "")
    if version != str(VERSION):
        newer = version.isdecimal() and len(version) < 10 and int(version) > VERSION
        remedy = "it was made by a newer mixkvq: upgrade" if newer else "save the cache again"
        raise CacheFileError(f"{path} has version {version!r:.40}, this mixkvq reads version {VERSION}; {remedy}")


# ---- values of JSON ------------------------------------------------------------------------------------------------
def _is(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r:.80}, must be of type {kind.__name__}")
    return value


def _some(value: Any, kind: type, name: str) -> Any:
    """As many as a model may have layers."""
    if len(_is(value, kind, name)) > MAX_LAYERS:
        raise ValueError(f"{name} are {len(value)}, must be {MAX_LAYERS} at most")
    return value


def _text(value: Any) -> str:
    if len(_is(value, str, "text")) > _MAX_TEXT:
        raise ValueError(f"a text of {len(value)} characters")
    return str(value)


def _count(value: Any, name: str, most: int = MAX_COUNT) -> int:
    if not 0 <= _is(value, int, name) <= most:
        raise ValueError(f"{name} is {value}, must be from 0 to {most}")
    return int(value)


def _reason(pair: Any) -> Reason | None:
    if pair is None:
        return None
    what, remedy = pair
    return Reason.saved(_text(what), _text(remedy))


# ---- the cache -----------------------------------------------------------------------------------------------------
class _Loader:
    """Makes a cache of JSON and tensors."""

    def __init__(
        self, about: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device, size: int
    ) -> None:
        self._about, self._tensors, self._device, self._size = about, tensors, device, size
        self._configs = [MixKVQConfig.from_json_object(fields) for fields in _some(about["configs"], list, "configs")]

    def cache(self, cls: type[C], placement: Placement) -> C:
        """All of it, and nothing left over."""
        about = self._about
        cache = cls(self._config(about["config"]), precision=_text(about["precision"]), offload=placement.offload)
        calibration = about["calibration"]
        if calibration is not None:
            cache.calibration = Calibration.from_json(_is(calibration["json"], str, "calibration"))
            cache._base_name = _text(calibration["name"])
        configs = by_layer("layer_configs", about["layer_configs"])
        cache._layer_configs = {index: self._config(number) for index, number in configs.items()}
        cache._learned = _is(about["learned"], bool, "learned")
        cache._record_past = _is(about["record_past"], bool, "record_past")
        for index, layer in enumerate(_some(about["layers"], list, "layers")):
            try:
                cache.layers.append(self._layer(cache, index, layer))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
                raise ValueError(f"layer {index}: {error!r:.400}") from error
            if not isinstance(cache.layers[index], MixKVQLayer):
                cache._account_foreign(index)
        if self._tensors:
            raise ValueError(f"tensors that no layer has: {', '.join(self._tensors)!r:.200}")
        return cache

    def _config(self, number: Any) -> MixKVQConfig:
        return self._configs[_count(number, "config", len(self._configs) - 1)]

    def _get(self, name: Any) -> torch.Tensor:
        """A tensor, once."""
        return self._take(name).to(self._device)

    def _take(self, name: Any) -> torch.Tensor:
        return self._tensors.pop(_is(name, str, "tensor"))

    def _layer(self, cache: MixKVQCache, index: int, about: dict[str, Any]) -> Any:
        if about["class"] not in (OURS, HYBRID):
            return foreign.decode(about, self._get, self._device)
        config = self._config(about["config"])
        layer = MixKVQLayer(config, cache.ledger, cache.precision, cache.placement)
        if about["class"] == HYBRID:
            layer = self._hybrid(layer, about["states"])
        layer.index = index
        tensors = {name: self._tensors_of(index, name) for name in _TENSORS}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        _restore(layer, about, given, self._device, self._size)
        return layer

    def _tensors_of(self, index: int, name: str) -> torch.Tensor | None:
        full = f"layers.{index}.{name}"
        return self._take(full) if full in self._tensors else None

    def _hybrid(self, layer: MixKVQLayer, states: dict[str, Any]) -> MixKVQLayer:
        from .linear import MixKVQHybridLayer  # only where transformers has such layers

        values = foreign.decode_attributes(states, self._get, self._device)
        number = foreign.number_of_states(values) if "number_of_states" in values else 1
        hybrid: MixKVQLayer = MixKVQHybridLayer(layer.mixkvq_config, layer.ledger, layer.precision, number)
        hybrid.placement = layer.placement
        foreign.assign(hybrid, values, LINEAR_STATES)
        foreign.check_linear(hybrid)
        return hybrid


_STORE = ("exact", "place", "blocks", "records", "mu", "has_mu")
_TENSORS = ("k", "v", "start", "query_sum", "query_count", *_STORE)
_MODES = {False: (PLAIN, NATIVE), True: (PACKED, DEQUANTIZED)}


def _restore(
    layer: MixKVQLayer, about: dict[str, Any], given: dict[str, torch.Tensor], device: torch.device, size: int
) -> None:
    """Give an empty layer what it had."""
    stored = "records" in given
    mode, dtype = about["mode"], about["dtype"]
    if mode not in _MODES[stored]:
        raise ValueError(f"mode is {mode!r:.40}")
    if dtype is not None:
        layer.dtype, layer.device, layer.is_initialized = TENSOR_DTYPES[dtype], device, True
    layer.mode = mode
    layer.reason = reasons.LOADED if mode == PACKED else _reason(about["reason"]) or reasons.EMPTY
    layer.decoded_for = _reason(about["decoded_for"])
    for name in ("record_past", "compiled", "waiting"):
        setattr(layer, name, _is(about[name], bool, name))
    layer._unseen = _is(about["unseen"], bool, "unseen")
    layer._unpadded = _is(about["unpadded"], bool, "unpadded")
    layer._unsettled = False
    layer.dequantizations = _count(about["dequantizations"], "dequantizations")
    layer.length = length = _count(about["length"], "length", size)  # a column has a byte at least
    if "k" in given and dtype is None:
        raise ValueError("keys without a dtype of the layer")
    queries = restored_queries(layer.mixkvq_config, given, about["query_count"])
    if stored:
        names = _is(about["dtypes"], list, "dtypes")
        layer._dtypes = tuple(TENSOR_DTYPES[name] for name in names)  # type: ignore[assignment]
        if (
            len(names) != 2
            or common_dtype(*(torch.empty(0, dtype=d, device="cpu") for d in layer._dtypes)) != given["k"].dtype
        ):
            raise ValueError(f"dtypes are {names!r:.80}, records of {given['k'].dtype}")
        raised = _count(about["raised"], "raised")
        layer.store = restored_store(layer.mixkvq_config, given, queries, length, raised)
        layer.store.move(device, layer.placement)
    else:
        _restore_plain(layer, given)
        layer._k, layer._v, layer.start = (
            None if t is None else t.to(device) for t in (layer._k, layer._v, layer.start)
        )
        queries.move(device)
    layer.queries = queries
    layer._account()


def _restore_plain(layer: MixKVQLayer, given: Mapping[str, torch.Tensor]) -> None:
    """Keys and values in full precision."""
    layer._k, layer._v, layer.start = k, v, start = given.get("k"), given.get("v"), given.get("start")
    unexpected = sorted(given.keys() & set(_STORE))
    if unexpected or (k is None) is not (v is None):
        raise ValueError(f"a layer without records has {', '.join(unexpected) or 'keys or values alone'}")
    if k is None or v is None:
        if layer.length:
            raise ValueError(f"length is {layer.length} without keys")
        return
    tokens = k.shape[-2] if k.dim() >= 3 else -1
    if tokens != layer.length or tokens <= 0 or v.dim() < 3 or (len(v), v.shape[-2]) != (len(k), tokens):
        raise ValueError(f"length is {layer.length}, keys {list(k.shape)} and values {list(v.shape)}")
    if len(k) and not k.numel():
        raise ValueError(f"{len(k)} rows of keys {list(k.shape)}, which hold nothing")
    if layer.mode == PLAIN:  # it will be packed
        if k.dim() != 4 or k.shape != v.shape or common_dtype(k, v) not in DTYPES:
            raise ValueError(f"keys {k.dtype} {list(k.shape)} and values {v.dtype} {list(v.shape)} cannot be packed")
        codec_of(layer.mixkvq_config, k, v)
    if start is not None:
        if start.dtype != torch.int64 or start.shape != k.shape[:1]:
            raise ValueError(f"start is {start.dtype} {list(start.shape)}")
        if not bool((((start >= 0) & (start < tokens)) | (start == NO_TOKEN)).all()):
            raise ValueError(f"start is beyond the {tokens} tokens")
