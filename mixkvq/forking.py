"""`MixKVQCache.fork`: copies of a cache that share its records."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypeVar

from .guard import InUse
from .layer import MixKVQLayer
from .saving import check_copyable

if TYPE_CHECKING:
    from .cache import MixKVQCache

C = TypeVar("C", bound="MixKVQCache")


def fork(cache: C, n: int) -> list[C]:
    """Copies; see `MixKVQCache.fork`."""
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n is {n!r}, must be an int")
    count = operator.index(n)
    if count < 1:
        raise ValueError(f"n is {count}, must be 1 or more")
    try:
        return cache.alone(lambda: _copies(cache, count))
    except InUse as error:
        raise ValueError(f"the cache cannot be forked: {error}") from error


def _copies(cache: C, count: int) -> list[C]:
    for index, layer in enumerate(cache.layers):
        try:
            check_copyable(layer)
        except ValueError as error:
            raise ValueError(f"the cache cannot be forked: layer {index} ({type(layer).__name__}): {error}") from error
    shared = [cache._model_config, cache.calibration, *_records(cache)]
    return [cache.copied({id(thing): thing for thing in shared}) for _ in range(count)]


def _records(cache: MixKVQCache) -> list[Any]:
    """The slabs of all layers, which are written once and never changed."""
    stores = [layer.store for layer in cache.layers if isinstance(layer, MixKVQLayer)]
    return [slab for store in stores if store is not None for slab in store.records.slabs]
