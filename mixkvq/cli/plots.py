"""The demo's figure: memory against tokens, and bits per key channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT, OURS = "#b45309", "#0f766e"


def _memory(axes: Any, trace: Sequence[tuple[int, int, int]], dtype: str, preset: str) -> None:
    tokens, exact, ours = (np.asarray(column, dtype=float) for column in zip(*trace, strict=True))
    unit = 1e6
    axes.plot(tokens, exact / unit, color=EXACT, lw=2.2, label=f"DynamicCache, {dtype}")
    if dtype == "float32":
        axes.plot(tokens, exact / 2 / unit, color=EXACT, lw=1.4, ls="--", label="the same in bfloat16 (half of it)")
    axes.plot(tokens, ours / unit, color=OURS, lw=2.2, label=f"MixKVQCache, {preset}")
    axes.annotate(
        f"{exact[-1] / ours[-1]:.1f} times less than {dtype}"
        + (f", {exact[-1] / 2 / ours[-1]:.1f} times less than bfloat16" if dtype == "float32" else ""),
        (tokens[-1], ours[-1] / unit),
        textcoords="offset points",
        xytext=(-8, 10),
        ha="right",
        color=OURS,
    )
    axes.set(xlabel="tokens in the cache", ylabel="cache, MB", title="Memory held by the cache", ylim=(0, None))
    axes.set_xlim(tokens[0], tokens[-1])
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", frameon=False)


def _bits(figure: Any, axes: Any, bits: NDArray[np.float64]) -> None:
    layers, heads, head_dim = bits.shape
    known = bits[np.isfinite(bits)]
    high = max(2.0, float(np.ceil(np.percentile(known, 99.5)))) if known.size else 2.0
    summary = f"all: {known.mean():.2f}" if known.size else "none packed"
    image = axes.imshow(
        bits.reshape(layers, heads * head_dim),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=1,
        vmax=high,
    )
    for border in range(1, heads):
        axes.axvline(border * head_dim - 0.5, color="white", lw=1.5)
    middle = [(h + 0.5) * head_dim - 0.5 for h in range(heads)]
    axes.set_xticks(middle, [f"head {h}" for h in range(heads)])
    axes.tick_params(axis="x", length=0)
    axes.set(
        xlabel=f"key channel ({head_dim} per KV head)",
        ylabel="layer",
        title=f"Bits per key channel, mean over blocks ({summary})",
    )
    above = bool(known.size) and known.max() > high
    figure.colorbar(image, ax=axes, label="bits", extend="max" if above else "neither", pad=0.015)


def demo_figure(
    path: Path, trace: Sequence[tuple[int, int, int]], bits: NDArray[np.float64], *, model: str, dtype: str, preset: str
) -> None:
    """Draw the figure and write it as PNG.

    Parameters
    ----------
    path : Path
        Where to; the folder must exist.
    trace : sequence of (tokens, bytes, bytes)
        Measured sizes of the exact cache and of ours.
    bits : float64 array [layers, KV heads, head_dim]
        Mean bits of the code of every key channel; NaN rows for layers without packed blocks are left white.
    model, dtype, preset : str
        For titles and legend.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(14, 5.4), dpi=120, layout="constrained")
    figure.suptitle(f"{model}: one text, two caches", fontsize=15)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    _memory(left, trace, dtype, preset)
    _bits(figure, right, bits)
    figure.savefig(path)
