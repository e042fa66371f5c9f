"""Decoding on a filled cache: tokens per second and bytes, all caches by turns."""

from __future__ import annotations

from functools import partial
from typing import Any

from mixkvq import MixKVQCache

from .bench import DYNAMIC, Bench
from .goals import MEMORY_RATIO, TOKENS_RATIO
from .llama import Late
from .timing import Case, out_of_memory, take_turns, times_faster

EMPTY = "DynamicCache, 1 token"
"""What a step costs without history."""


def decode(bench: Bench) -> list[str]:
    """Fill, time, record; a sentence per packing cache."""
    caches, held = _filled(bench)
    cases = {name: Case(name, partial(_steps, bench, cache), most=1) for name, cache in caches.items()}
    take_turns(list(cases.values()), bench.device, bench.sizes.rounds, bench.deadline)
    found = []
    for name, case in cases.items():
        rival = cases.get(DYNAMIC) if name not in (DYNAMIC, EMPTY) else None
        found += _report(bench, name, case, rival, caches[name], held)
    return found


def _filled(bench: Bench) -> tuple[dict[str, Any], dict[str, int]]:
    empty = bench.caches[DYNAMIC]()
    caches: dict[str, Any] = {EMPTY: empty}
    held = {EMPTY: bench.fill(empty, bench.sizes.batch, 1)}
    for name, make in bench.caches.items():
        cache = make()
        try:
            held[name] = bench.fill(cache, bench.sizes.batch, bench.sizes.context)
        except (Late, RuntimeError) as error:
            late = isinstance(error, Late)
            if not late and not out_of_memory(error):
                raise
            del cache
            bench.free()
            bench.leave_out(name, "no time left" if late else "does not fit beside the others", part="decode")
            continue
        caches[name] = cache
    return caches, held


def _steps(bench: Bench, cache: Any) -> None:
    for _ in range(bench.sizes.steps):
        bench.step(cache, bench.sizes.batch)


def _report(bench: Bench, name: str, case: Case, rival: Case | None, cache: Any, held: dict[str, int]) -> list[str]:
    sizes = bench.sizes
    seconds = case.median / sizes.steps
    ratio = times_faster(case, rival) if rival else None
    share = held[name] / held[DYNAMIC] if rival else None
    if name != EMPTY:
        bench.row_bytes[name] = held[name] / sizes.batch
    values: dict[str, float | None] = {
        "tokens_per_second": sizes.batch / seconds,
        "ms_per_step": seconds * 1e3,
        "kv_bytes": held[name],
        "step_peak_bytes": bench.extra(partial(bench.step, cache, sizes.batch)),
        "times_faster": ratio,
        "share_of_kv_bytes": share,
    }
    facts: dict[str, Any] = {"filled": "random keys and values through cache.update, no prefill"}
    if name != EMPTY:
        shape = sizes.shape
        elements = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        values["effective_bits"] = 8 * held[name] / (elements * sizes.batch * sizes.context)
    if isinstance(cache, MixKVQCache):  # its report would count millions of records one by one
        facts["paths"] = sorted({getattr(layer, "mode", "native") for layer in cache.layers})
        facts["speed goal"], facts["memory goal"] = TOKENS_RATIO.verdict(ratio), MEMORY_RATIO.verdict(share)
    where = bench.where(batch=sizes.batch, tokens=sizes.context)
    bench.log.add("model", name, where, values, part="decode", **facts)
    against = f", {ratio:.2f} x tokens/s, {share:.3f} x KV bytes" if ratio and share else ""
    line = f"{name}: {sizes.batch / seconds:.1f} tokens/s, {held[name] / 1e9:.3f} GB{against}"
    if facts.get("paths", ["packed"]) != ["packed"]:
        line += f" (NOT ALL PACKED: {', '.join(facts['paths'])})"
    print(f"decode {line}", flush=True)
    return [line] if isinstance(cache, MixKVQCache) else []
