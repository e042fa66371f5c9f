"""Figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .bars import fastest
from .rows import Row, cells
from .sheets import context
from .step import STEP

_COLORS = ("#0f766e", "#2dd4bf", "#b45309", "#f59e0b", "#6d28d9", "#a78bfa", "#475569", "#94a3b8")
Lines = dict[str, list[tuple[int, float]]]


def draw(path: Path, title: str, panels: dict[str, Lines], *, y: str) -> None:
    """One panel per entry side by side, lines over tokens, written as PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(4.2 * len(panels) + 2.6, 4.8), dpi=120, layout="constrained")
    figure.suptitle(title)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    palette = _COLORS if len(names) > 4 else _COLORS[::2]
    colors = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for part, (caption, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            tokens, values = zip(*sorted(points), strict=True)
            part.plot(tokens, values, marker="o", ms=4, color=colors[name], label=name)
        part.set(title=caption, xlabel="tokens in the cache")
        lengths = sorted({length for points in lines.values() for length, _ in points})
        part.set_xscale("log", base=2)
        part.set_xticks(lengths, [context(length) for length in lengths])
        part.set_yscale("log")
        part.grid(alpha=0.25, which="both")
    axes[0].set_ylabel(y)
    handles = {label: line for part in axes for line, label in zip(*part.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.savefig(path)


def _lines(found: Sequence[dict[str, Row]], pick: Callable[[list[Row]], dict[str, Row | None]]) -> Lines:
    lines: Lines = {}
    for cell in found:
        for name, row in pick(list(cell.values())).items():
            if row is not None:
                lines.setdefault(name, []).append((row.where["tokens"], row.median * 1e6))
    return lines


def _kernel_lines(rows: list[Row]) -> dict[str, Row | None]:
    packed = {r.system: r for r in rows if r.facts["role"] == "packed" and not r.facts.get("in_cache")}
    torch = {f"best torch {short}": fastest(rows, role="torch", dtype=short) for short in ("fp32", "bf16")}
    core = {f"core {short}": fastest(rows, role="core", dtype=short) for short in ("fp32", "bf16")}
    return {**packed, **torch, **core}


def _panels(
    path: Path,
    rows: Sequence[Row],
    pick: Callable[[list[Row]], dict[str, Row | None]],
    what: str,
    machine: str,
    unit: str,
) -> None:
    """Times over tokens, a panel per group: largest head_dim, fewest threads."""
    head_dim, threads = max(r.where["head_dim"] for r in rows), min(r.where["threads"] for r in rows)
    part = [r for r in rows if (r.where["head_dim"], r.where["threads"]) == (head_dim, threads)]
    panels = {}
    for group in dict.fromkeys(row.where["group"] for row in part):
        found = cells(row for row in part if row.where["group"] == group)
        panels[f"{group} query head{'s' * (group > 1)} per KV head"] = _lines(found, pick)
    title = f"{what}, head_dim {head_dim}, {threads} thread{'s' * (threads > 1)}\n{machine}"
    draw(path, title, panels, y=f"microseconds {unit}")


def kernels(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Attention of one decode step."""
    _panels(path, rows, _kernel_lines, "Attention of one decode step", machine, "per layer")


def step(path: Path, rows: Sequence[Row], machine: str) -> None:
    """A whole decode step."""
    rows = [row for row in rows if row.where["part"] == STEP]
    _panels(path, rows, lambda found: {row.system: row for row in found}, "One decode step", machine, "per step")


def tokens(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Tokens per second over the length of the prompt: decoding, and reading it."""
    panels: dict[str, Lines] = {}
    for phase, caption in (("decode", "decoding, one at a time"), ("prefill", "reading the prompt")):
        lines = panels.setdefault(caption, {})
        for row in (row for row in rows if row.where["phase"] == phase):
            count = row.where["tokens"] if phase == "prefill" else 1
            lines.setdefault(row.system, []).append((row.where["tokens"], count / row.median))
    draw(path, f"Tokens per second, {rows[0].where['threads']} threads\n{machine}", panels, y="tokens/s")
