"""The largest batch that fits at a context: computed from the bytes of a row, then tried, and less if need be."""

from __future__ import annotations

import torch

from .bench import DYNAMIC, Bench
from .llama import Late
from .timing import out_of_memory

SHARES = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Of the computed batch, tried in this order."""


def largest(bench: Bench) -> None:
    """Find and record it for every cache whose rows have a known size."""
    for name in (*bench.sizes.presets, DYNAMIC):
        if name not in bench.row_bytes:
            continue
        room = 8 * bench.row_bytes[name]
        if bench.device == "cuda":
            room = torch.cuda.get_device_properties(0).total_memory - bench.weights - bench.sizes.spare
        computed = max(1, int(room / bench.row_bytes[name]))
        rows, why = _fitting(bench, name, computed)
        values: dict[str, float | None] = {"rows": rows, "computed_rows": computed}
        where = bench.where(tokens=bench.sizes.context)
        bench.log.add("model", name, where, values, part="largest batch", why=why)
        print(f"largest batch {name}: {rows or f'not verified ({why})'}, computed {computed}", flush=True)


def _fitting(bench: Bench, name: str, computed: int) -> tuple[int | None, str]:
    chunk = 0 if name == DYNAMIC else bench.sizes.chunk
    for share in SHARES:
        rows = max(1, int(share * computed))
        bench.free()
        cache = bench.caches[name]()
        try:
            bench.fill(cache, rows, bench.sizes.context, chunk)
            for _ in range(2):
                bench.step(cache, rows)
            bench.free()
            return rows, "filled, then decoded two steps"
        except Late:
            return None, "no time left"
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            del cache
    return None, "none of the batches tried fits"
