"""What a cache holds: the path of every layer and why, bits and bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .reasons import Reason


@dataclass
class Ledger:
    """Bytes held by all layers of one cache, as they change, and what was warned about."""

    total: int = 0
    peak: int = 0
    warned: bool = False

    def change(self, old: int, new: int, passing: int = 0) -> None:
        """A layer that held ``old`` bytes holds ``new`` ones, and on the way held ``passing`` ones besides."""
        self.total += new - old
        self.peak = max(self.peak, self.total + passing)

    def reset_peak(self) -> None:
        """The peak counts from now on."""
        self.peak = self.total

    def warn(self, message: str) -> None:
        """Warn once per cache."""
        if not self.warned:
            self.warned = True
            warnings.warn(f"MixKVQCache: {message} (see cache.report(); warned once per cache)", stacklevel=3)


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Attributes
    ----------
    index : int
    path : {"packed", "dequantized", "native"}
        Attention reads packed records; attention gets decoded tensors in every step; the layer holds full precision.
    why : Reason
        Why, and what a user could do.
    tokens : int
        Columns seen, padding included.
    nbytes : int
        Bytes of all tensors of the layer.
    elements : int
        Elements of K and V that it holds (padding that is not stored left out).
    record_bytes, code_bytes, metadata_bytes : int
        Of its records: in all; codes and exact channels; scales and offsets.
    record_elements : int
        Elements in its records.
    dequantizations : int
        How often all of it was decoded.
    raised_scales : int
        Scales that had to be raised for their offset to fit, since the cache was made.
    exact_blocks : int
        Records that hold exact values, because a key or value was not finite or did not fit (or by the preset).
    host_bytes : int
        Of its records in pinned host memory (``offload=True``).
    decoded_for : Reason or None
        Why the last call was decoded that the kernel could not serve, on a packed layer.
    """

    index: int
    path: str
    why: Reason
    tokens: int
    nbytes: int
    elements: int
    record_bytes: int = 0
    code_bytes: int = 0
    metadata_bytes: int = 0
    record_elements: int = 0
    dequantizations: int = 0
    raised_scales: int = 0
    exact_blocks: int = 0
    host_bytes: int = 0
    decoded_for: Reason | None = None

    @property
    def reason(self) -> str:
        """What happened."""
        return self.why.what

    @property
    def remedy(self) -> str:
        """What a user could do."""
        return self.why.remedy

    @property
    def overhead_bytes(self) -> int:
        """Headers, channel maps and alignment of the records."""
        return self.record_bytes - self.code_bytes - self.metadata_bytes

    @property
    def true_bits(self) -> float:
        """Bits per packed element, everything in the records counted; 0.0 while nothing is packed."""
        return 8 * self.record_bytes / self.record_elements if self.record_elements else 0.0


_HEAD = ("layer", "path", "tokens", "bytes", "true bits", "codes", "metadata", "overhead", "decoded")


@dataclass(frozen=True)
class Report:
    """All layers of a cache; ``print`` it for a table.

    Attributes
    ----------
    preset : str
    layers : list of LayerReport
    nbytes : int
        Bytes of all tensors that the cache holds, storage shared between layers counted once.
    peak_nbytes : int
        The most it held since it was made, or since `MixKVQCache.reset_peak`, with the buffers that packing needs while
        it runs; not what is decoded for a model that does not read packed records.
    """

    preset: str
    layers: list[LayerReport] = field(default_factory=list)
    nbytes: int = 0
    peak_nbytes: int = 0

    @property
    def true_bits(self) -> float:
        """8 * bytes of all records / elements in them (docs/format.md section 6); 0.0 while nothing is packed."""
        elements = sum(layer.record_elements for layer in self.layers)
        return 8 * sum(layer.record_bytes for layer in self.layers) / elements if elements else 0.0

    @property
    def effective_bits(self) -> float:
        """8 * all bytes held / all elements held; 0.0 for an empty cache."""
        elements = sum(layer.elements for layer in self.layers)
        return 8 * self.nbytes / elements if elements else 0.0

    def __str__(self) -> str:
        rows = [_HEAD, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        left = {1}
        lines = [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        summary = (
            f"preset {self.preset}: {self.true_bits:.3f} true bits, {self.effective_bits:.3f} effective bits, "
            f"{self.nbytes:,} bytes, at most {self.peak_nbytes:,}"
        )
        notes = [
            f"{name.replace('_', ' ')}: {total:,}"
            for name in ("exact_blocks", "raised_scales", "host_bytes")
            if (total := sum(getattr(layer, name) for layer in self.layers))
        ]
        return "\n".join([*lines, summary, *notes, *self._reasons()])

    def _reasons(self) -> list[str]:
        """Every distinct reason with the layers it holds for and the remedy."""
        layers: dict[tuple[str, Reason], list[int]] = {}
        for layer in self.layers:
            layers.setdefault((layer.path, layer.why), []).append(layer.index)
        for layer in self.layers:
            if layer.decoded_for is not None:
                layers.setdefault(("decoded at times", layer.decoded_for), []).append(layer.index)
        return [f"{_ranges(held)} {path}: {why}" for (path, why), held in layers.items()]


def _ranges(indices: list[int]) -> str:
    """Indices in ascending order as in "layers 0-4, 6"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    names = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"layer{'s' if len(indices) > 1 else ''} {names}"


def _cells(layer: LayerReport) -> tuple[str, ...]:
    packed = layer.record_elements > 0
    return (
        str(layer.index),
        layer.path,
        f"{layer.tokens:,}",
        f"{layer.nbytes:,}",
        f"{layer.true_bits:.3f}" if packed else "-",
        *(f"{n:,}" if packed else "-" for n in (layer.code_bytes, layer.metadata_bytes, layer.overhead_bytes)),
        str(layer.dequantizations),
    )


def tensors_in(thing: Any) -> Iterable[torch.Tensor]:
    """All tensors in a tensor, or in nested lists, tuples and dicts."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors_in(value)


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
