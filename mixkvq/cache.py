"""`MixKVQCache`: a `DynamicCache` whose attention layers hold packed records."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch.compiler import is_compiling
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from . import compat, guard, parallel, reasons
from .arrays import precision_code
from .calibration import Calibration
from .config import MixKVQConfig
from .fingerprint import ModelRecord
from .guard import exclusive
from .handle import Handles, PackedHandle
from .hook import TAG, Tag, install
from .layer import NATIVE, MixKVQLayer
from .linear import move_states
from .loading import SavedFor
from .mask_sizes import MaskSizes
from .placement import placed
from .report import LayerReport, Ledger, Report, held_bytes, tensors_in
from .saved import Saved
from .sending import SentAsCopy
from .states import check_states

if compat.HybridLayer is not None:
    from .linear import MixKVQHybridLayer


class MixKVQCache(Saved, MaskSizes, SentAsCopy, DynamicCache):
    """A key/value cache in mixed precision (arXiv 2512.19206), read by packed kernels, in the place of `DynamicCache`.

    Parameters
    ----------
    preset : str or MixKVQConfig
        Name of a preset (`list_presets`) or a configuration; or ``ddp_cache_data``, which `DynamicCache` takes first.
    ddp_cache_data : iterable of (keys, values, ...), optional
        What the layers hold from the beginning, as other caches give it when iterated over.
    config : transformers.PreTrainedConfig, optional
        The model's configuration, as in `DynamicCache`: lays sliding-window and other layers out at once. Without it
        the cache learns the layout in the first attention call.
    calibration : str, Path or Calibration, optional
        What ``mixkvq calibrate`` found for this model: fields that replace the preset's, for all or for single layers.
    precision : {"default", "exact", "fast"}
        Of attention: see `ops.attend`. Where everything is stored as it is (``lossless``) always "exact".
    offload : bool
        Keep packed records of layers on a CUDA device in pinned host memory, which the kernels read over the bus: room
        for longer texts, at the speed of the bus. Layers on the CPU are as without.
    offloading : bool
        As in `DynamicCache`, but only False: no layer is moved to and fro.
    **overrides
        Fields of `MixKVQConfig` that replace the preset's and the calibration's, such as ``sink_length=8``.

    Raises
    ------
    TypeError
        For a wrong type or an unknown field, naming the fix.
    ValueError
        For an unknown preset, a field outside its allowed set, or a calibration that is none or is for another preset
        or model. The model is checked at once with ``config``, else in the first attention call; if that cannot be
        seen, the second `update` asks for ``config``. The cache is empty then.

    Notes
    -----
    One thread at a time. After a forward pass that broke off, by an error or Ctrl-C, `crop` back to the length before
    makes the cache whole; until then the next pass is refused with a RuntimeError that says so, or that only `reset`
    helps: docs/faults.md. Every other change happens wholly or not at all.

    Examples
    --------
    >>> cache = MixKVQCache()
    >>> model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache
    >>> print(cache.report())
    """

    def __init__(
        self,
        preset: str | MixKVQConfig | Iterable[Sequence[Any]] = "default",
        *,
        ddp_cache_data: Iterable[Sequence[Any]] | None = None,
        config: Any = None,
        calibration: str | Path | Calibration | None = None,
        precision: str = "default",
        offload: bool = False,
        offloading: bool = False,
        **overrides: Any,
    ) -> None:
        compat.warn_if_unknown()
        if offloading:
            raise ValueError(
                f"offloading is {offloading!r}, must be False: the layers of a MixKVQCache are not moved to and fro; "
                "offload=True keeps the packed records of layers on a CUDA device in host memory"
            )
        if ddp_cache_data is None and isinstance(preset, Iterable) and not _says_how(preset):
            preset, ddp_cache_data = "default", preset
        self.mixkvq_config = _configuration(preset, overrides)
        self.calibration = None if calibration is None else Calibration.of(calibration)
        self._layer_configs: dict[int, MixKVQConfig] = {}
        if self.calibration is not None:
            base = self.mixkvq_config
            self._base_name = preset if isinstance(preset, str) else base.name
            self.calibration.check_preset(self._base_name)
            self.mixkvq_config = self.calibration.config(base, overrides)
            self._layer_configs = self.calibration.layer_configs(base, overrides)
        precision_code(precision)
        self.precision = precision
        self.ledger, self.placement = Ledger(), placed(offload)
        self._model_config = config
        self.model_record: ModelRecord | None = None
        self._saved_for: SavedFor | None = None  # from a file, and no model was seen since
        self._learned = self._record_past = False
        self._met = False  # the model that asks, which only matters to several processes
        self._foreign: dict[int, int] = {}  # bytes of transformers' own layers, by index
        self._last = -1  # layer of the last update that was not short
        self._awaiting = False  # whether the hook must see its attention
        self._handles = Handles()
        self._no_pass()
        factory = functools.partial(MixKVQLayer, self.mixkvq_config, self.ledger, precision, self.placement)
        Cache.__init__(self, layer_class_to_replicate=factory)  # type: ignore[arg-type]
        if config is not None:
            self._take_config(config)
        install()
        if ddp_cache_data is not None:
            self._fill(ddp_cache_data)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        install()  # perhaps in a process that has made no cache

    # ---- growing ---------------------------------------------------------------------------------------------------
    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add the keys and values of new tokens to a layer.

        Parameters
        ----------
        key_states, value_states : tensor [B, H, n, D]
        layer_idx : int
            0 or more; layers are made on demand unless the cache was given the model's configuration.

        Returns
        -------
        keys, values : tensor [B, H, N, D]
            To be handed to the model's attention.

        Raises
        ------
        TypeError, ValueError, IndexError
            Naming the argument; the cache is unchanged then.
        RuntimeError
            If another thread uses the cache, or a forward pass broke off that must be undone first.
        """
        if is_compiling():
            compiled: tuple[Any, Any] = self._update_outside_graph(key_states, value_states, layer_idx)
            return compiled
        if get_ident() != self._runner:
            self._join()
        if not self._awaiting and type(layer_idx) is int and 0 <= layer_idx < len(self.layers):
            layer: Any = self.layers[layer_idx]
            if isinstance(layer, MixKVQLayer) and (pair := layer.extend(key_states, value_states, self._handles)):
                return pair
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @exclusive
    def _update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        layer = self._layer_to_update(key_states, value_states, layer_idx)
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        ours = isinstance(layer, MixKVQLayer)
        self._last, self._awaiting = layer_idx, ours and layer.waiting
        if not ours:
            self._account_foreign(layer_idx)
        if type(keys) is not PackedHandle and (self._open or (ours and layer.mode != NATIVE)):
            tag = Tag(self, layer_idx, layer.epoch if ours else 0, ours and layer.store is not None)
            keys, values = keys.view_as(keys), values.view_as(values)  # neither the caller's tensors nor the layer's
            setattr(keys, TAG, tag)
            setattr(values, TAG, tag)
        return keys, values

    def _layer_to_update(self, key: Any, value: Any, layer_idx: Any) -> Any:
        try:
            index = operator.index(layer_idx)
        except TypeError:
            raise TypeError(f"layer_idx is {layer_idx!r}, must be an int") from None
        if index < 0:
            raise IndexError(f"layer_idx is {index}, must be 0 or more")
        if self._last >= 0 and self._open:
            self._check_model(None)  # the attention of the first layer was not seen
            self._learned |= index <= self._last  # another forward pass: its masks are made for these layers
        if self._last not in (index, -1) and self._last < len(self.layers):
            previous = self.layers[self._last]  # its attention has run by now
            if isinstance(previous, MixKVQLayer) and previous.waiting:
                previous.overlooked()
        if index >= len(self.layers) or not getattr(self.layers[index], "length", 1):
            self._check_first_tokens(index, key)
        if index >= len(self.layers):
            if self.layer_class_to_replicate is None:
                raise IndexError(
                    f"layer_idx is {index}, must be below {len(self.layers)}, the number of layers in config"
                )
            check_states(key, value)
            while len(self.layers) <= index:
                self.layers.append(self._new_layer(len(self.layers)))
        elif type(self.layers[index]) is compat.LinearLayer:
            self._to_hybrid(index, getattr(self.layers[index], "number_of_states", 1))
        return self.layers[index]

    def _fill(self, data: Iterable[Sequence[Any]]) -> None:
        """Take over what other caches held, layer by layer."""
        for index, states in enumerate(data):
            if not isinstance(states, Sequence) or len(states) < 2:
                raise TypeError(f"ddp_cache_data has {states!r} for layer {index}, must be (keys, values)")
            key, value = states[:2]
            if key is not None or value is not None:
                check_states(key, value)
            if index >= len(self.layers):
                theirs = DynamicCache([tuple(states)]).layers[0]  # a third element may say that it is a sliding layer
                self.layers.append(self._new_layer(index) if type(theirs) is DynamicLayer else theirs)
                if type(theirs) is not DynamicLayer:
                    self._account_foreign(index)
                    continue
            if key is not None:
                self.update(key, value, index)

    def _config_of(self, index: int) -> MixKVQConfig:
        """The configuration of one layer."""
        return self._layer_configs.get(index, self.mixkvq_config)

    def _new_layer(self, index: int) -> MixKVQLayer:
        layer = MixKVQLayer(self._config_of(index), self.ledger, self.precision, self.placement)
        layer.index = index
        self._recording(layer)
        return layer

    def _recording(self, layer: Any) -> Any:
        if self._record_past and hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
        return layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @exclusive
    def _update_outside_graph(self, key_states: Any, value_states: Any, layer_idx: int) -> tuple[Any, Any]:
        """In a compiled model: plain or decoded tensors, and no hook."""
        layer = self._layer_to_update(key_states, value_states, layer_idx)
        layer.compiled = True
        keys, values = layer.update(key_states, value_states)
        self._last, self._awaiting = layer_idx, True
        if type(keys) is PackedHandle:
            keys, values = layer.decode()
            layer.served_decoded(reasons.COMPILED)
        return keys, values

    # ---- the layout ------------------------------------------------------------------------------------------------
    def layer_of_call(self, index: int, module: Any) -> Any:
        """The layer that an attention call belongs to; the first call tells the layout (see `hook`)."""
        if self._open:
            self._meet(getattr(module, "config", None))
        return self.layers[index]

    @exclusive
    def _meet(self, config: Any) -> None:
        self._check_model(config)
        if config is not None:
            self._lay_out(config)
        self._learned = True

    @property
    def _open(self) -> bool:
        """Whether an attention call must tell which model this is."""
        return not self._learned or self._saved_for is not None

    def _take_config(self, config: Any) -> None:
        """Take the model's configuration from the caller."""
        self._model_config = config
        self._check_model(config)
        self._lay_out(config)

    def _check_model(self, config: Any) -> None:
        """Refuse a model that calibration or file are not for, or whose heads cannot be spread; and be empty again."""
        try:
            if config is not None:
                layers = (self.mixkvq_config, *self._layer_configs.values())
                parallel.check_tensor_parallel(config, {layer.allocate for layer in layers})
            if self._saved_for is not None:
                self._saved_for.check(config)
                self._saved_for = None
            if self.calibration is not None:
                if config is None:
                    raise ValueError(
                        "calibration cannot be checked: the model's attention does not tell its configuration; pass "
                        "MixKVQCache(..., config=model.config)"
                    )
                self.calibration.check_model(config)
        except (TypeError, ValueError):
            self._model_config = None
            self.reset()
            raise
        self.model_record = ModelRecord.of(config) if hasattr(config, "get_text_config") else None

    def _lay_out(self, config: Any) -> None:
        """Let transformers lay the model out and take over the layers that are exactly growing full attention."""
        given = config is self._model_config
        try:
            layout = compat.hf_layout(config)
        except Exception:
            if given:
                raise
            return  # a configuration that cannot be read: full attention in every layer is right, if not thrifty
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self._apart = frozenset(getattr(text, "cross_attention_layers", None) or ())
        for index, theirs in enumerate(layout):
            have = self.layers[index] if index < len(self.layers) else None
            layer = self._choose(index, have, theirs)
            if have is None:
                self.layers.append(layer)
            elif layer is not have:
                self.layers[index] = layer
                if isinstance(have, MixKVQLayer) and not isinstance(layer, MixKVQLayer):
                    have.reset()  # its bytes leave the ledger
                    self._account_foreign(index)
        self._learned = True
        if given:
            self.layer_class_to_replicate = None

    def _choose(self, index: int, have: Any, theirs: Any) -> Any:
        """The layer to use where transformers would use ``theirs`` and the cache may already have one."""
        if type(theirs) is DynamicLayer:
            return self._new_layer(index) if have is None else have
        if compat.HybridLayer is not None and type(theirs) is compat.HybridLayer:
            if isinstance(have, MixKVQHybridLayer):
                return have
            states = getattr(theirs, "number_of_states", 1)
            new = MixKVQHybridLayer(self._config_of(index), self.ledger, self.precision, states)
            new.index, new.placement = index, self.placement
            if have is not None:
                new.__dict__.update(have.__dict__)
            return self._recording(new)
        if have is not None and not isinstance(have, MixKVQLayer):
            return have  # a linear layer that holds its state
        self._recording(theirs)
        if compat.LinearMixin is not None and isinstance(have, compat.LinearMixin):
            move_states(have, theirs)
        if have is not None and have.length:  # in the first forward pass
            theirs.update(*have.decode())
        return theirs

    # ---- the whole cache -------------------------------------------------------------------------------------------
    def activate_past_recording(self) -> None:
        """Expect a rollback after every call, in layers made later too: assisted decoding asks before there is one."""
        self._record_past = True
        for layer in self.layers:
            self._recording(layer)

    def reset(self) -> None:
        """Forget everything, also what is half changed; layout and model are learned again.

        Raises
        ------
        RuntimeError
            If another thread uses a layer; nothing has changed then.
        """
        guard.alone_with(self._parts(), self._reset, emptying=True)

    def _reset(self) -> None:
        had, foreign, late = self.layers, self._foreign, self._late()
        self.layers, self._foreign, self._learned, self._last, self._awaiting = [], {}, False, -1, False
        self._met, self._handles, self._saved_for = False, Handles(), None
        self._no_pass()
        self._overtaken = late
        for layer in had:
            if isinstance(layer, MixKVQLayer):
                layer.reset()  # its bytes leave the ledger
        self.ledger.change(sum(foreign.values()), 0)
        if self._model_config is None:
            self.model_record = None
        else:
            self._lay_out(self._model_config)

    def reset_peak(self) -> None:
        """Count ``report().peak_nbytes`` from now on, such as after the prompt."""
        self.ledger.reset_peak()

    def _account_foreign(self, index: int) -> None:
        held = held_bytes(tensors_in(vars(self.layers[index])))
        self.ledger.change(self._foreign.get(index, 0), held)
        self._foreign[index] = held

    def report(self) -> Report:
        """Path, reason, bits and bytes of every layer; works at any time, prints as a table."""
        layers, tensors = [], []
        for index, layer in enumerate(self.layers):
            held = list(tensors_in(vars(layer)))
            if isinstance(layer, MixKVQLayer):
                held += layer.tensors()
                layers.append(layer.report(index))
            else:
                layers.append(_foreign_report(index, layer, held))
            tensors += held
        workspaces = self.placement.workspaces.tensors()
        nbytes = held_bytes([*tensors, *workspaces])
        name = self.mixkvq_config.name if self.calibration is None else f"{self._base_name} (calibrated)"
        return Report(name, layers, nbytes, max(nbytes, self.ledger.peak + held_bytes(workspaces)))


def _foreign_report(index: int, layer: Any, held: list[torch.Tensor]) -> LayerReport:
    """A layer that transformers made."""
    states = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    elements = sum(t.numel() for t in (states if hasattr(layer, "keys") else held))
    why = reasons.transformers_layer(
        type(layer).__name__,
        window=getattr(layer, "sliding_window", None),
        linear=compat.LinearMixin is not None and isinstance(layer, compat.LinearMixin),
        empty=compat.DummyLayer is not None and isinstance(layer, compat.DummyLayer),
    )
    return LayerReport(index, NATIVE, why, int(length), held_bytes(held), elements)


def _says_how(preset: Any) -> bool:
    """Whether a first argument is no keys and values; a model's configuration, which can be iterated over, is wrong."""
    return isinstance(preset, (str, MixKVQConfig)) or hasattr(preset, "get_text_config")


def _configuration(preset: Any, overrides: dict[str, Any]) -> MixKVQConfig:
    """The configuration that the first argument and the overrides of `MixKVQCache` mean."""
    if isinstance(preset, MixKVQConfig):
        return preset.replace(**overrides)
    if isinstance(preset, str):
        return MixKVQConfig.preset(preset, **overrides)
    if hasattr(preset, "get_text_config"):
        raise TypeError(f"preset is a {type(preset).__name__}; pass a model's configuration as MixKVQCache(config=...)")
    raise TypeError(
        f"preset is {preset!r}, must be the name of a preset or a MixKVQConfig, as in MixKVQCache('default')"
    )
