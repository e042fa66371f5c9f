"""Figures of the harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .kl import Summary

_COLORS = {"packed": "#0f766e", "simulated": "#b45309", "transformers": "#6d28d9"}
_NAMES = {"packed": "packed", "simulated": "simulated", "transformers": "transformers' QuantizedCache"}


def _short(name: str) -> str:
    """A scheme's name without the folders of its calibration."""
    preset, at, file = name.partition("@")
    return f"{preset}{at}{Path(file).name}" if at else name


def frontier(path: Path, rows: Sequence[Summary], title: str) -> Path:
    """KL against true bits, one point per scheme that counts its bits, with 95 % intervals.

    Returns
    -------
    Path
        Of the PNG.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(8.5, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    seen: set[str] = set()
    left: dict[float, bool] = {}  # names of points one above the other stand on both sides in turn
    for row in sorted(rows, key=lambda row: row.kl.value):
        if row.true_bits is None or row.kl.value <= 0:
            continue
        kind, kl = row.scheme.kind, row.kl
        error = None if kl.low != kl.low else [[kl.value - kl.low], [kl.high - kl.value]]
        axes.errorbar(
            row.true_bits,
            kl.value,
            yerr=error,
            fmt="o" if kind == "packed" else "D",
            ms=6,
            capsize=3,
            color=_COLORS[kind],
            label=None if kind in seen else _NAMES[kind],
        )
        seen.add(kind)
        column = round(row.true_bits, 1)
        left[column] = not left.get(column, True)
        axes.annotate(
            _short(row.scheme.name),
            (row.true_bits, kl.value),
            textcoords="offset points",
            xytext=(-8 if left[column] else 8, 3),
            ha="right" if left[column] else "left",
            fontsize=9,
        )
    axes.set(xlabel="true bits per number in the coded blocks", ylabel="KL to the exact cache, nats", title=title)
    axes.set_yscale("log")
    axes.margins(x=0.12)
    axes.grid(alpha=0.25, which="both")
    if seen:
        axes.legend(frameon=False)
    figure.savefig(path)
    return path
