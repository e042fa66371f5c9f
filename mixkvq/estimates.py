"""`estimate`: the bytes that a `MixKVQCache` will hold, from a model's configuration alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cache import MixKVQCache
from .calibration import Calibration
from .config import MixKVQConfig
from .layer import MixKVQLayer
from .layer_estimates import LayerEstimate, estimate_ours, estimate_theirs
from .shapes import cached_layers
from .sizes import Amount, MeasuredRecords, measured_records
from .states import DTYPES


@dataclass(frozen=True)
class Estimate:
    """What `estimate` returns.

    Attributes
    ----------
    preset : str
    dtype : str
        Of the model.
    tokens, batch, prompt : int
    layers : tuple of LayerEstimate
    peak : Amount
        The most bytes on the way.
    """

    preset: str
    dtype: str
    tokens: int
    batch: int
    prompt: int
    layers: tuple[LayerEstimate, ...] = field(repr=False)
    peak: Amount = field(repr=False)

    @functools.cached_property
    def amount(self) -> Amount:
        """Bytes of all layers."""
        return sum((layer.amount for layer in self.layers), Amount.of(0))

    @property
    def nbytes(self) -> int | None:
        """``MixKVQCache.report().nbytes``; None where it depends on what is read and no calibration measured it."""
        return self.amount.rounded

    @property
    def least_nbytes(self) -> int:
        """Never fewer."""
        return self.amount.least

    @property
    def most_nbytes(self) -> int:
        """Never more."""
        return self.amount.most

    @property
    def peak_nbytes(self) -> int | None:
        """``report().peak_nbytes``: the prompt in full precision while it is packed, layer by layer, and buffers.

        Up to a few percent more for small caches: all layers are taken to begin at once.
        """
        return self.peak.rounded

    @property
    def most_peak_nbytes(self) -> int:
        """Never more at any time: what memory must have room for."""
        return self.peak.most

    @property
    def dynamic_nbytes(self) -> int:
        """What `DynamicCache` takes for the same tokens."""
        return sum(layer.dynamic_nbytes for layer in self.layers)

    @property
    def record_elements(self) -> int:
        """Elements in records."""
        return sum(layer.record_elements for layer in self.layers)

    @property
    def true_bits(self) -> float | None:
        """``report().true_bits``; 0.0 while nothing is packed, None where it depends on what is read."""
        low, high = self.true_bits_range
        records = sum((layer.record_bytes for layer in self.layers), Amount.of(0))
        if low == high or records.expected is None:
            return low if low == high else None
        return 8 * records.expected / self.record_elements

    @property
    def true_bits_range(self) -> tuple[float, float]:
        """Least and most true bits."""
        records = sum((layer.record_bytes for layer in self.layers), Amount.of(0))
        count = self.record_elements
        return (8 * records.least / count, 8 * records.most / count) if count else (0.0, 0.0)

    @property
    def effective_bits(self) -> float | None:
        """``report().effective_bits``; None where it depends on what is read."""
        elements = sum(layer.elements for layer in self.layers)
        if self.nbytes is None or not elements:
            return None if elements else 0.0
        return 8 * self.nbytes / elements


def estimate(
    config: Any,
    *,
    tokens: int,
    batch: int = 1,
    prompt: int | None = None,
    preset: str | MixKVQConfig = "default",
    dtype: str | torch.dtype | None = None,
    calibration: str | Path | Calibration | None = None,
    **overrides: Any,
) -> Estimate:
    """Bytes that ``MixKVQCache(preset, ...).report().nbytes`` will say, windows and tables included.

    No weights are loaded: the model's code runs without numbers (`mixkvq.shapes`), and the layers that transformers
    keeps for itself (sliding windows, linear states) are counted as it stores them. Rows are taken to be of one length
    and the last token to have been decoded alone, as ``generate`` does; right after a long prompt sliding layers of
    transformers still hold all of it. Cross attention to an encoder is no part of a `MixKVQCache` and not counted.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Such as ``model.config`` or ``AutoConfig.from_pretrained(name)``.
    tokens : int
        Read and generated so far, per row. Of what ``generate`` returns, the last token was not read yet.
    batch : int
        Rows; beams and returned sequences count as rows.
    prompt : int, optional
        How many of the tokens were read at once, before the others one by one: for the peak. Default: all but the last.
    preset, calibration, **overrides
        As in `MixKVQCache`.
    dtype : str or torch.dtype, optional
        Of the model: float32, float16 or bfloat16. Default: what the configuration says, else float32.

    Returns
    -------
    Estimate
        Its ``nbytes`` is None for thresholds (``paper``), whose records depend on what is read, unless the calibration
        measured them for these fields; ``least_nbytes`` and ``most_nbytes`` are always known.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    ImportError
        Before transformers 5.0.
    """
    for name, value in (("tokens", tokens), ("batch", batch), ("prompt", 1 if prompt is None else prompt)):
        if type(value) is not int:
            raise TypeError(f"{name} is {value!r}, must be an int")
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    prompt = max(tokens - 1, 1) if prompt is None else prompt
    if prompt > tokens:
        raise ValueError(f"prompt is {prompt}, must be at most tokens ({tokens})")
    weights = _dtype(config, dtype)
    cache = MixKVQCache(preset, config=config, calibration=calibration, **overrides)
    measured = _measured(cache)
    shapes = cached_layers(config, weights, tokens)

    def read(before: int, count: int) -> tuple[LayerEstimate, ...]:
        """All layers when ``count`` tokens were read: at once, or one by one after ``before`` of them."""
        return tuple(
            estimate_ours(index, layer.mixkvq_config, shape, (before, count), batch, measured.get(index))
            if isinstance(layer, MixKVQLayer)
            else estimate_theirs(index, layer, shape, (before, count), batch)
            for index, (layer, shape) in enumerate(zip(cache.layers, shapes, strict=True))
        )

    layers = read(prompt if prompt < tokens else 0, tokens)
    return Estimate(
        cache.report().preset, DTYPES[weights], tokens, batch, prompt, layers, _peak(read(0, prompt), layers)
    )


def _peak(prompt: Iterable[LayerEstimate], last: Sequence[LayerEstimate]) -> Amount:
    """The most held: as a prompt is packed, layer by layer; or at the end, when a block of some layer is packed."""
    held = Amount.of(0)
    peak = sum((layer.amount for layer in last), Amount.of(max((layer.passing_bytes for layer in last), default=0)))
    for layer in prompt:
        held += layer.amount
        peak = peak.or_more(held + Amount.of(layer.passing_bytes))
    return peak


# ---- arguments -----------------------------------------------------------------------------------------------------
def _dtype(config: Any, given: Any) -> torch.dtype:
    """dtype of the weights."""
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config is {config!r}, must be a model's configuration, such as model.config")
    said = (getattr(c, "dtype", None) for c in (config, config.get_text_config(decoder=True)))
    found = given if given is not None else next((d for d in said if d is not None), torch.float32)
    known = {name: dtype for dtype, name in DTYPES.items()}
    if isinstance(found, str):
        found = known.get(found.removeprefix("torch."), found)
    if found not in DTYPES:
        raise ValueError(f"dtype is {found!r}, must be one of {', '.join(known)}")
    return found


def _measured(cache: MixKVQCache) -> dict[int, MeasuredRecords]:
    """What the calibration measured of every layer that is coded as it was then; where its records end is no matter."""
    if cache.calibration is None:
        return {}
    then = cache.calibration
    base, records = MixKVQConfig.preset(then.preset), measured_records(then.summary)
    configs, rest = then.layer_configs(base), then.config(base)

    def same(index: int) -> bool:
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if not isinstance(layer, MixKVQLayer):
            return False
        now, was = layer.mixkvq_config, configs.get(index, rest)
        return now == was.replace(sink_length=now.sink_length, residual_length=now.residual_length)

    return {index: found for index, found in records.items() if same(index)}
