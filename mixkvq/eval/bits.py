"""True and effective bits of one cache, and of all the caches of a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def bits_of(cache: Any) -> dict[str, Any]:
    """True and effective bits of a cache, and the paths of its layers; None where the cache does not tell."""
    if not hasattr(cache, "report"):
        return {"true_bits": None, "effective_bits": None, "paths": {}}
    report = cache.report()
    paths = [layer.path for layer in report.layers]
    return {
        "true_bits": report.true_bits,
        "effective_bits": report.effective_bits,
        "record_bytes": sum(layer.record_bytes for layer in report.layers),
        "record_elements": sum(layer.record_elements for layer in report.layers),
        "raised_scales": sum(layer.raised_scales for layer in report.layers),
        "exact_blocks": sum(layer.exact_blocks for layer in report.layers),
        "paths": {path: paths.count(path) for path in sorted(set(paths))},
    }


def bits_over(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """True bits (all records together) and effective bits (mean) over what `bits_of` told of several caches.

    The first is None where nothing is packed, the second where a cache does not tell.
    """
    elements = sum(row.get("record_elements", 0) for row in rows)
    effective = [row["effective_bits"] for row in rows]
    true_bits = 8 * sum(row["record_bytes"] for row in rows) / elements if elements else None
    return true_bits, None if None in effective else float(np.mean(effective))
