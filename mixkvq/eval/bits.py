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
        "true_bits": 8 * nbytes / elements if elements else None,
        "record_bytes": nbytes,
        "record_elements": elements,
        "paths": dict(sorted(Counter(x.path for x in layers).items())),
    }
    if not hasattr(cache, "report"):
        held = elements + exact_elements(cache)
        return found | {"effective_bits": 8 * cache_nbytes(cache) / held if held else None}
    report = cache.report()
    return found | {
        "effective_bits": report.effective_bits,
        "raised_scales": sum(layer.raised_scales for layer in report.layers),
        "exact_blocks": sum(layer.exact_blocks for layer in report.layers),
    }


def bits_over(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """True bits (all records together) and effective bits (mean) over what `bits_of` told of several caches.

    The first is None where nothing is packed, the second where a cache does not tell.
    """
    elements = sum(row.get("record_elements", 0) for row in rows)
    effective = [row["effective_bits"] for row in rows]
    true_bits = 8 * sum(row["record_bytes"] for row in rows) / elements if elements else None
    return true_bits, None if None in effective else float(np.mean(effective))
