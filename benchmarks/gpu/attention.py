"""Attention of one decode step over packed records, against the best bfloat16 SDPA, by turns inside one run.

Rows of the batch are as many as give a gigabyte of records for the smallest preset. A result is compared with float64
attention on the decoded keys and values before it is timed. Shares are of the copy and the read rate measured at the
start of the same run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixkvq import ops

from . import data, rates, rivals
from .goals import COPY_SHARE, GIGABYTE, SDPA_RATIO, kernels_count
from .options import parse
from .record import Row
from .shapes import GRID, TINY, Shape
from .timing import Case, graphed, out_of_memory, take_turns, times_faster

BOUND = 2e-3 + 2**-8
"""Relative error: what attention promises, and rounding to bfloat16."""

CHECKED = 2
"""Batch rows that are compared."""


def batch_for(dim: int, tokens: int, device: str) -> int:
    """Rows that give a gigabyte of records, or a quarter of it below the lengths that goals are for."""
    if device == "cpu":
        return CHECKED
    k, v = data.states(1, 512, dim, device)
    packed = data.Packed.of("compact", k, v)
    per_token = packed.record_bytes / (int(packed.store.blocks[0]) * packed.store.config.block_length)
    wanted = GIGABYTE if tokens >= 32768 else GIGABYTE // 4
    return int(1.02 * wanted / (per_token * tokens)) + 1


@dataclass(frozen=True)
class Checkable:
    """A packed history, and what its first rows hold, decoded from a history of these rows alone."""

    packed: data.Packed
    decoded: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, preset: str, k: Tensor, v: Tensor) -> Checkable:
        """Pack keys and values [B, H, N, D]."""
        alone = data.Packed.of(preset, k[:CHECKED], v[:CHECKED])
        return cls(data.Packed.of(preset, k, v), alone.decoded())

    def error(self, q: Tensor) -> float:
        """Relative error of attention in the first rows."""
        want = data.exact_attention(q[:CHECKED], *self.decoded)
        return data.relative_error(ops.attend(self.packed.store.core(), q)[:CHECKED], want)


class Comparison:
    """All systems at one shape."""

    def __init__(self, options: argparse.Namespace, speed: rates.Rates) -> None:
        self._options, self._speed = options, speed

    def at(self, shape: Shape) -> Iterator[str]:
        """Measure; yields a line per result."""
        device, dim, tokens = self._options.device, shape.head_dim, shape.tokens
        batch = shape.rows or batch_for(dim, tokens, device)
        k, v = data.states(batch, tokens, dim, device)
        stores: dict[str, Checkable] = {}
        for preset in self._options.presets or shape.presets:
            if self._options.deadline.passed(5):
                break
            stores[preset] = Checkable.of(preset, k, v)
        for group in shape.groups:
            if self._options.deadline.passed(5):
                yield f"left out for lack of time: {shape}, {group} query heads"
                continue
            where = {"head_dim": dim, "tokens": tokens, "group": group, "batch": batch, "heads": data.HEADS}
            yield from self._group(where, stores, data.queries(batch, group, dim, device), k, v)

    def _group(
        self, where: dict[str, Any], stores: dict[str, Checkable], q: Tensor, k: Tensor, v: Tensor
    ) -> Iterator[str]:
        device = self._options.device
        calls, refused = rivals.all_of(where["group"], device, q, k, v)
        nbytes = dict.fromkeys(calls, k.nbytes + v.nbytes)
        errors: dict[str, float] = {}
        for preset, store in stores.items():
            packed, errors[preset] = store.packed, store.error(q)
            if not errors[preset] <= BOUND:
                raise SystemExit(
                    f"{preset} at {where}: relative error {errors[preset]:.3g}, must be at most {BOUND:.3g}"
                )
            calls[preset], nbytes[preset] = partial(ops.attend, packed.store.core(), q), packed.nbytes
        cases, graphs, why = self._cases(calls)
        take_turns([*cases.values(), *graphs.values()], device, self._options.rounds, self._options.deadline)
        for name, text in refused.items():
            self._options.log.add("kernels", name, where, {"us": None}, role="rival", why=text)
        yield from self._report(where, stores, cases, graphs, nbytes, errors, why)

    def _cases(self, calls: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Case], dict[str, Case], dict[str, str]]:
        cases, graphs, why = {}, {}, {}
        for name, call in calls.items():
            cases[name] = Case(name, call)
            replay, why[name] = graphed(call, self._options.device)
            if replay is not None:
                graphs[name] = Case(f"{name}, graph", replay)
        return cases, graphs, why

    def _report(
        self,
        where: dict[str, Any],
        stores: dict[str, Checkable],
        cases: dict[str, Case],
        graphs: dict[str, Case],
        nbytes: dict[str, int],
        errors: dict[str, float],
        why: dict[str, str],
    ) -> Iterator[str]:
        def quickest(name: str) -> Case:
            return min((c for c in (cases[name], graphs.get(name)) if c), key=lambda case: case.median)

        others = [name for name in cases if name not in stores]
        rival = min(others, key=lambda name: quickest(name).median, default=None)
        for name, case in cases.items():
            best, moved = quickest(name), nbytes[name]
            rate = moved / best.median
            values: dict[str, float | None] = {
                "us": case.median * 1e6,
                "us_graph": graphs[name].median * 1e6 if name in graphs else None,
                "bytes": moved,
                "gbps": rate / 1e9,
                "share_of_copy": rate / self._speed.copy,
                "share_of_read": rate / self._speed.read,
            }
            facts: dict[str, Any] = {"role": "rival", "best_rival": name == rival, "graph": why[name] or "replayed"}
            if name in stores:
                ratio = times_faster(best, quickest(rival)) if rival else None
                values |= {
                    "times_faster": ratio,
                    "error": errors[name],
                    "record_bytes": stores[name].packed.record_bytes,
                }
                facts |= {"role": "packed", "rival": rival or "none"}
                if kernels_count(where["tokens"], stores[name].packed.record_bytes):
                    facts["copy goal"] = COPY_SHARE.verdict(values["share_of_copy"])
                    facts["sdpa goal"] = SDPA_RATIO.verdict(ratio)
            self._options.log.add("kernels", name, where, values, **facts)
            yield (
                f"{where['head_dim']:4} {where['tokens']:7} G={where['group']} B={where['batch']:3} {name:28} "
                f"{best.median * 1e6:10.1f} us {rate / 1e9:8.1f} GB/s {100 * rate / self._speed.copy:5.1f} % of copy"
                + (f" {values['times_faster']:.2f} x {rival}" if values.get("times_faster") else "")
            )


def summary(rows: list[Row]) -> str:
    """One line: what the cases that goals are for reach, the worst and the best of them."""
    ours = [row for row in rows if row.facts.get("role") == "packed"]
    counted = [row for row in ours if "copy goal" in row.facts]
    shapes = len({str(row.where) for row in ours})
    text = f"== {len(ours)} packed cases at {shapes} shapes; with 32k tokens, 1 GB and more: "
    if not counted:
        return text + "none"
    shares = [100 * (row.values["share_of_copy"] or 0) for row in counted]
    ratios = [row.values["times_faster"] or 0 for row in counted]
    return text + (
        f"{min(shares):.0f} to {max(shares):.0f} % of the copy rate (floor {100 * COPY_SHARE.floor:g}), "
        f"{min(ratios):.2f} to {max(ratios):.2f} times SDPA (floor {SDPA_RATIO.floor:g})"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure the grid, as far as time allows."""
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--presets", nargs="+", help="these at every shape")
    options = parse(__doc__, arguments, more)
    speed = rates.measure(options.device, 5)
    rates.record(options.log, speed)
    comparison = Comparison(options, speed)
    for shape in TINY if options.rehearse else GRID:
        if options.deadline.passed(10 if not options.rehearse else 0):
            print(f"left out for lack of time: {shape}", flush=True)
            continue
        try:
            for line in comparison.at(shape):
                print(line, flush=True)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            print(f"left out, does not fit into memory: {shape}", flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(summary(options.log.rows))


if __name__ == "__main__":
    main()
