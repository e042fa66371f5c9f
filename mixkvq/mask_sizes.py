"""What models ask a cache before attention: how many columns it has, how large masks are."""

from __future__ import annotations

from typing import Any

from torch.compiler import is_compiling
from transformers.cache_utils import CacheLayerMixin

from . import compat, parallel
from .layer import MixKVQLayer
from .linear import LinearStates


class MaskSizes(LinearStates):
    """The part of a cache that answers this, also where layers never get tokens; `MixKVQCache` has the rest."""

    _learned: bool
    _met: bool

    def _check_model(self, config: Any) -> None:
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen; of the first layer with tokens when layer 0 has none (see `_standing_in`)."""
        self._check_asking_model()
        if self._unknown(layer_idx):
            return 0
        layer = self._standing_in(0) if layer_idx == 0 else None
        return int(super().get_seq_length(layer_idx) if layer is None else layer.get_seq_length())

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns before the next query, for a layer's mask."""
        layer = None if self._unknown(layer_idx) else self._standing_in(layer_idx)
        return self.get_seq_length(layer_idx) if layer is None else int(layer.get_seq_length())

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Columns of a layer's mask for this many new queries, and the first column.

        Raises
        ------
        RuntimeError
            If a forward pass broke off, saying how to go on, or another thread's is under way.
        """
        self._check_asking_model()
        layer = None if self._unknown(layer_idx) else self._standing_in(layer_idx, alike=True)
        if not is_compiling():
            own = self.layers[layer_idx] if layer is None and layer_idx < len(self.layers) else layer
            self._begin_pass(compat.query_length(query_length), own)
        if self._unknown(layer_idx):
            return compat.query_length(query_length), 0
        sizes: tuple[int, int] = (
            super().get_mask_sizes(query_length, layer_idx) if layer is None else layer.get_mask_sizes(query_length)
        )
        return sizes

    def _standing_in(self, layer_idx: int, *, alike: bool = False) -> Any:
        """The next layer with tokens (``alike``: and with the same masks) where this one has none; None if it has.

        Layers run in order: one without tokens before one with tokens never gets any in this process. It is of an
        earlier stage of a pipeline, or will turn out to be a linear layer.
        """
        own: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        counts = isinstance(own, CacheLayerMixin)
        if own is None or (counts and own.get_seq_length()) or (not counts and layer_idx):
            return None
        counting = [layer for layer in self.layers[layer_idx:] if isinstance(layer, CacheLayerMixin)]
        wanted = _kind(counting[0]) if counting and alike else None
        filled = (layer for layer in counting if layer.get_seq_length())
        return next((layer for layer in filled if not alike or _kind(layer) == wanted), None)

    def _unknown(self, layer_idx: int) -> bool:
        """Whether a layer with a linear state may turn out to have keys too, which its first attention call tells."""
        if self._learned or not self._is_linear(layer_idx) or isinstance(self.layers[layer_idx], CacheLayerMixin):
            return False
        return layer_idx > 0 or not any(isinstance(layer, CacheLayerMixin) for layer in self.layers)

    def _check_asking_model(self) -> None:
        """Where there are several processes, find out which model will fill this cache."""
        if not (self._learned or self._met) and parallel.several_processes():
            config = parallel.asking_config()
            if config is not None:
                self._check_model(config)
                self._met = True


def _kind(layer: Any) -> Any:
    """What layers with the same masks have in common."""
    return "growing" if isinstance(layer, MixKVQLayer) else (type(layer), getattr(layer, "sliding_window", None))
