"""A long prompt in one forward pass: peak memory above the model's, what is left of it, and time."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from mixkvq.compat import cache_argument

from .bench import DYNAMIC, Bench
from .goals import PREFILL_RATIO
from .timing import out_of_memory


def _read(bench: Bench, cache: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        bench.model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def prefill(bench: Bench) -> None:
    """Read random tokens with every cache, record."""
    peak: dict[str, float] = {}
    tokens = bench.sizes.prompt
    ids = torch.randint(8, bench.sizes.shape.vocab_size, (1, tokens), device=bench.device)
    _read(bench, bench.caches[DYNAMIC](), ids[:, :256])  # libraries take their memory
    for name in (DYNAMIC, *bench.sizes.presets):
        if bench.deadline.passed(2 if bench.device == "cuda" else 0):
            bench.leave_out(name, "no time left", part="prefill")
            continue
        bench.free()
        cache, before, begin = bench.caches[name](), bench.held(), time.perf_counter()
        try:
            most = bench.extra(partial(_read, bench, cache, ids))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            bench.leave_out(name, "does not fit", part="prefill")
            continue
        seconds, left = time.perf_counter() - begin, bench.held() - before
        peak[name] = most or 0
        share = peak[name] / peak[DYNAMIC] if name != DYNAMIC and peak.get(DYNAMIC) else None
        values: dict[str, float | None] = {
            "seconds": seconds,
            "peak_bytes": most,
            "steady_bytes": left,
            "share_of_peak": share,
        }
        goal = {} if name == DYNAMIC else {"peak goal": PREFILL_RATIO.verdict(share)}
        bench.log.add("model", name, bench.where(batch=1, tokens=tokens), values, part="prefill", **goal)
        against = f", {share:.2f} of the peak" if share else ""
        print(
            f"prefill {name}: {tokens} tokens in {seconds:.2f} s, peak {peak[name] / 1e9:.3f} GB, "
            f"then {left / 1e9:.3f} GB{against}",
            flush=True,
        )
