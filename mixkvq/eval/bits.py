"""True and effective bits of one cache, and of all the caches of a measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .memory import cache_nbytes, coded_layers, exact_elements


def bits_of(cache: Any) -> dict[str, Any]:
    """True and effective bits of a cache, and the paths of its layers; None where nothing is coded."""
    layers = coded_layers(cache)
    nbytes, elements = sum(x.nbytes for x in layers), sum(x.elements for x in layers)
    found: dict[str, Any] = {
        "record_bytes": nbytes,
        "record_elements": elements,
        "paths": dict(sorted(Counter(x.path for x in layers).items())),
    }
    found["true_bits"] = true_bits([found])
    if not hasattr(cache, "report"):
        held = elements + exact_elements(cache)
        return found | {"effective_bits": 8 * cache_nbytes(cache) / held if held else None}
    report = cache.report()
    return found | {
        "effective_bits": report.effective_bits,
        "raised_scales": sum(layer.raised_scales for layer in report.layers),
        "exact_blocks": sum(layer.exact_blocks for layer in report.layers),
    }


def true_bits(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """8 * "record_bytes" / "record_elements" of all rows together; None where nothing is coded."""
    elements = sum(row["record_elements"] for row in rows)
    return 8 * sum(row["record_bytes"] for row in rows) / elements if elements else None


def bits_over(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """True bits (all records together) and effective bits (mean) over what `bits_of` told of several caches.

    The first is None where nothing is packed, the second where a cache does not tell.
    """
    effective = [row["effective_bits"] for row in rows]
    return true_bits(rows), None if None in effective else float(np.mean(effective))
