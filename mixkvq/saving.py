"""`MixKVQCache.save`: a cache as one safetensors file; docs/saving.md has the format, `loading` reads it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import compat, foreign, strict_json, tensorfile
from .calibration import MAX_LAYERS
from .config import MixKVQConfig
from .files import checked_path
from .guard import InUse
from .layer import PACKED, MixKVQLayer
from .linear import LINEAR_STATES
from .report import tensors_in
from .store import PackedStore
from .tensorfile import NAMES, Entry
from .version import __version__

if TYPE_CHECKING:
    from .cache import MixKVQCache
    from .calibration import Calibration

FORMAT, VERSION = "mixkvq-cache", 1
HYBRID, OURS = "MixKVQHybridLayer", "MixKVQLayer"


def save(cache: MixKVQCache, path: str | os.PathLike[str]) -> None:
    """Write a cache; see `MixKVQCache.save`."""
    file = checked_path(path)
    _check_whole(cache)  # here too, so that a pass that is under way is not disturbed
    try:
        cache.alone(lambda: _write(cache, file))
    except InUse as error:
        raise ValueError(f"the cache cannot be saved: {error}") from error


def _check_whole(cache: MixKVQCache) -> None:
    if (ragged := cache.half_done()) is not None:
        raise ValueError(f"the cache cannot be saved: a forward pass broke off or is under way: {ragged}")


def _write(cache: MixKVQCache, file: Path) -> None:
    _check_whole(cache)
    writer = _Writer()
    text = json.dumps(writer.cache(cache), separators=(",", ":"))
    try:
        strict_json.parse(text)
    except ValueError as error:  # such as a NaN in the model's configuration
        raise ValueError(f"the cache cannot be saved, as it could not be loaded: {error}") from error
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "preset": cache.report().preset,
        "model": "" if cache.model_record is None else cache.model_record.fingerprint,
        "mixkvq": __version__,
        "cache": text,
    }
    columns = max((layer.length for layer in cache.layers if isinstance(layer, MixKVQLayer)), default=0)
    if columns > sum(entry.nbytes for entry in writer.entries.values()):  # `loading` would not believe it
        raise ValueError(f"the cache cannot be saved: it has no rows, or its {columns} columns are padding")
    tensorfile.write(file, metadata, writer.entries)


class _Writer:
    """Turns a cache into JSON and tensors.

    Attributes
    ----------
    entries : dict
        The tensors, by name.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._configs: list[MixKVQConfig] = []

    def cache(self, cache: MixKVQCache) -> dict[str, Any]:
        """All of it.

        Raises
        ------
        ValueError
            Naming a layer that cannot be saved, and why.
        """
        config, layer_configs = self._config(cache.mixkvq_config), {}
        for index, of_layer in sorted(cache._layer_configs.items()):
            layer_configs[str(index)] = self._config(of_layer)
        layers = [self._layer(index, layer) for index, layer in enumerate(cache.layers)]
        for what, count in (
            ("layers", len(layers)),
            ("configurations", len(self._configs)),
            ("layers with configurations of their own", len(layer_configs)),
        ):
            if count > MAX_LAYERS:
                raise ValueError(f"the cache cannot be saved: it has {count} {what}, a file has {MAX_LAYERS} at most")
        calibration = None
        if cache.calibration is not None:
            calibration = {"name": cache._base_name, "json": self._calibration(cache.calibration)}
        return {
            "configs": [json.loads(one.to_json()) for one in self._configs],
            "config": config,
            "layer_configs": layer_configs,
            "calibration": calibration,
            "precision": cache.precision,
            "model": None if cache.model_record is None else dataclasses.asdict(cache.model_record),
            "learned": cache._learned,
            "record_past": cache._record_past,
            "layers": layers,
        }

    def _calibration(self, calibration: Calibration) -> str:
        try:
            return calibration.to_json()
        except (ValueError, TypeError) as error:
            raise ValueError(f"the cache cannot be saved: its calibration has no JSON: {error}") from error

    def _config(self, config: MixKVQConfig) -> int:
        """Its number among all configurations."""
        if config not in self._configs:
            self._configs.append(config)
        return self._configs.index(config)

    def _layer(self, index: int, layer: Any) -> dict[str, Any]:
        name, where = type(layer).__name__, f"layers.{index}"
        try:
            check_copyable(layer)
            if name in (OURS, HYBRID) and isinstance(layer, MixKVQLayer):
                return {"class": name, **self._ours(where, layer)}
            if compat.layer_classes().get(name) is not type(layer):
                raise ValueError("only layers of mixkvq and of transformers' cache_utils can be saved")
            attributes = foreign.encode(vars(layer), lambda name, t: self._put(f"{where}.{name}", t))
        except ValueError as error:
            raise ValueError(f"the cache cannot be saved: layer {index} ({name}): {error}") from error
        return {"class": name, "attributes": attributes}

    def _put(self, name: str, tensor: torch.Tensor) -> str:
        self.entries[name] = Entry.of(tensor)
        return name

    def _ours(self, where: str, layer: MixKVQLayer) -> dict[str, Any]:
        ready = layer.is_initialized and layer.dtype is not None
        about: dict[str, Any] = {
            "config": self._config(layer.mixkvq_config),
            "mode": layer.mode,
            "reason": None if layer.mode == PACKED else dataclasses.astuple(layer.reason),
            "decoded_for": None if layer.decoded_for is None else dataclasses.astuple(layer.decoded_for),
            "length": layer.length,
            "dtype": NAMES.get(layer.dtype) if ready else None,
            "record_past": layer.record_past,
            "compiled": layer.compiled,
            "waiting": layer.waiting,
            "unseen": layer._unseen,
            "unpadded": layer._unpadded,
            "dequantizations": layer.dequantizations,
        }
        tensors: dict[str, torch.Tensor | None] = {}
        queries = layer.queries
        if layer.store is None:
            tensors |= {"k": layer._k, "v": layer._v, "start": layer.start}
        else:
            queries = layer.store.queries
            about |= {"raised": layer.store.raised, "dtypes": [NAMES[dtype] for dtype in layer._dtypes]}
            tensors |= self._store(where, layer.store)
        tensors["query_sum"], tensors["query_count"], about["query_count"] = queries.parts
        if type(layer).__name__ == HYBRID:
            states = {name: vars(layer)[name] for name in LINEAR_STATES if name in vars(layer)}
            about["states"] = foreign.encode(states, lambda name, t: self._put(f"{where}.{name}", t))
        for name, tensor in tensors.items():
            if tensor is not None:
                if tensor.dtype not in NAMES:
                    raise ValueError(f"its {name} is a {tensor.dtype}, which a file cannot hold")
                self._put(f"{where}.{name}", tensor)
        return about

    def _store(self, where: str, store: PackedStore) -> Mapping[str, torch.Tensor | None]:
        """The tensors of a store, without what is not in use; its records are put at once."""
        used = max(store.exact.tolist(), default=0)
        for name, buffer in (("k", store.k), ("v", store.v)):
            shape = (*buffer.shape[:2], used, buffer.shape[3])
            self.entries[f"{where}.{name}"] = Entry(buffer.dtype, shape, partial(_in_use, buffer, store.exact, used))
        table = store.records
        place, source, sizes = table.layout()
        gathered = partial(table.gathered, source, sizes)
        self.entries[f"{where}.records"] = Entry(torch.uint8, (int(sizes.sum()),), gathered)
        mu = store.mu
        if mu is not None and store.has_mu is not None:
            mu = torch.where(store.has_mu.unsqueeze(2) != 0, mu, 0)
        return {
            "exact": store.exact,
            "start": store.start,
            "place": place,
            "blocks": store.blocks,
            "mu": mu,
            "has_mu": store.has_mu,
        }


def _in_use(buffer: torch.Tensor, exact: torch.Tensor, used: int) -> torch.Tensor:
    """The tokens in use, zeros behind those of a shorter row."""
    inside = torch.arange(used, device=buffer.device) < exact.view(-1, 1)
    return torch.where(inside.view(len(exact), 1, used, 1), buffer[:, :, :used], 0)


def check_copyable(layer: Any) -> None:
    """Refuse a layer of which a copy would not be the same.

    Raises
    ------
    ValueError
        Saying what to do.
    """
    held = [*tensors_in(vars(layer)), *(layer.tensors() if isinstance(layer, MixKVQLayer) else [])]
    if any(tensor.requires_grad for tensor in held):
        raise ValueError("it holds gradients; fill the cache under torch.no_grad()")
    if isinstance(layer, MixKVQLayer) and not layer.length and (layer._k is not None or layer._v is not None):
        raise ValueError("keys or values were assigned to it that are not of the same tokens")
