"""`Saved`: the part of a cache that puts it into a file, takes it out of one, and copies it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self, cast

from transformers.cache_utils import Cache

from . import forking, loading, saving

if TYPE_CHECKING:
    from .cache import MixKVQCache


class Saved(Cache):
    """Files and forks of a cache; `MixKVQCache` has the rest."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file, as small as its records, which `load` reads in any process.

        Written beside ``path``, then renamed: whenever this process ends, there is the old file or the whole new one.

        Raises
        ------
        ValueError
            If a layer cannot be saved, naming it and why: gradients, or a layer that is neither ours nor one of
            transformers' cache_utils. Nothing is written then.
        OSError
            If the file cannot be written. What was there before stays.
        """
        saving.save(cast("MixKVQCache", self), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: Any = None, device: Any = "cpu", *, offload: bool = False
    ) -> Self:
        """Read what `save` wrote. Nothing in the file is executed, and all of it is checked: docs/saving.md.

        Parameters
        ----------
        path : str or Path
        config : transformers.PreTrainedConfig, optional
            The model's configuration; it must be that of the model that filled the cache, RoPE settings included.
            Without it that is checked in the first attention call.
        device : str or torch.device
            For all layers. Where some are packed: the CPU, or a CUDA device with kernels. Everything is checked on the
            CPU first.
        offload : bool
            As in the class.

        Raises
        ------
        ValueError
            If the device is not there, or there are no kernels for it.
        CacheFileError
            A `ValueError`, naming the file and what is wrong: truncated, damaged, no cache, made by a newer mixkvq, or
            for another model; or, in the second `update`, a model that could not be seen.
        OSError
            If the file cannot be read.
        """
        return cast(Self, loading.load(cast("type[MixKVQCache]", cls), path, config, device, offload))

    def fork(self, n: int) -> list[Self]:
        """n caches with the same content, for n continuations of one prompt.

        They share the packed records, which are never changed. Each has its own window, statistics and other layers,
        and goes on alone, in a thread of its own if need be; so does this cache.

        Raises
        ------
        TypeError, ValueError
            If n is not a number from 1, or a layer holds gradients.
        """
        return cast("list[Self]", forking.fork(cast("MixKVQCache", self), n))
