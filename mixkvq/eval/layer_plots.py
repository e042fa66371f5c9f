"""The figure of ``mixkvq eval layers``: maps of layers by channels, and of layers by heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layers import Maps

Doubles = NDArray[np.float64]


def _map(figure: Any, axes: Any, values: Doubles, layers: list[int], *, title: str, label: str, **style: Any) -> None:
    """A heat map [layers, heads, channels] or [layers, heads], with heads apart."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    rows, heads, *channels = values.shape
    width = channels[0] if channels else 1
    image = axes.imshow(
        values.reshape(rows, heads * width), aspect="auto", interpolation="nearest", **{"cmap": "viridis", **style}
    )
    if channels:
        for border in range(1, heads):
            axes.axvline(border * width - 0.5, color="white", lw=1.5)
        axes.set_xticks([(h + 0.5) * width - 0.5 for h in range(heads)], [f"KV head {h}" for h in range(heads)])
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xticks(range(0, heads, max(1, heads // 12)))
        axes.set_xlabel("query head")
    step = max(1, rows // 10)
    axes.set_yticks(range(0, rows, step), [str(i) for i in layers[::step]])
    axes.set(ylabel="layer", title=title)
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.015)
    if "norm" in style:  # logarithmic: plain numbers at 1, 2 and 5
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        bar.ax.yaxis.set_minor_locator(NullLocator())


def _log_range(values: Doubles) -> Any:
    """Colours by logarithm, from the 1st percentile to the largest."""
    from matplotlib.colors import LogNorm

    known = values[np.isfinite(values) & (values > 0)]
    low, high = (float(x) for x in (np.percentile(known, 1), known.max())) if known.size else (0.1, 1.0)
    return LogNorm(low, high if high > low else low * 1.01)


def layer_maps(path: Path, maps: Maps, title: str) -> Path:
    """Query size and key spread on top; below, one row per scheme: bits per key channel, error per head.

    Parameters
    ----------
    path : Path
        Of the PNG.
    maps : Maps
    title : str

    Returns
    -------
    Path
        ``path``.
    """
    from matplotlib.figure import Figure

    names = list(maps.output)
    rows = 1 + len(names)
    height = 1.6 + 0.11 * len(maps.layers)
    figure = Figure(figsize=(17, 0.6 + rows * max(2.6, height)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=14)
    mosaic: Any = [["importance"] * 2 + ["spread"] * 2]
    mosaic += [[f"bits {name}"] * 2 + [f"logits {name}", f"output {name}"] for name in names]
    grid = figure.subplot_mosaic(mosaic)
    layers = maps.layers
    norms = {name: _log_range(getattr(maps, name)) for name in ("importance", "spread")}
    _map(
        figure, grid["importance"], maps.importance, layers,
        title="Query size I_d (root mean square of q_d)", label="I_d", norm=norms["importance"],
    )  # fmt: skip
    _map(
        figure, grid["spread"], maps.spread, layers,
        title="Key spread S_d ((max - min)/3 over a block)", label="S_d", norm=norms["spread"],
    )  # fmt: skip
    top = {error: _top([getattr(maps, error)[n] for n in names]) for error in ("logits", "output")}
    known = [x[np.isfinite(x)] for x in maps.key_bits.values()]
    most = float(np.ceil(np.percentile(np.concatenate(known), 99.5))) if known else 2.0
    for name in names:
        axes = grid[f"bits {name}"]
        if name in maps.key_bits:
            bits = maps.key_bits[name]
            mean = f"{np.nanmean(bits):.2f}"
            _map(
                figure, axes, bits, layers,
                title=f"{name}: bits per key channel (mean {mean})", label="bits", vmin=1, vmax=max(2.0, most),
            )  # fmt: skip
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{name}: no packed records", ha="center", transform=axes.transAxes)
        for error, what in (("logits", "logits"), ("output", "attention output")):
            values = getattr(maps, error)[name]
            size = np.sqrt(np.nanmean(values**2))
            _map(
                figure, grid[f"{error} {name}"], values, layers,
                title=f"{name}: error of {what} ({size:.3f})", label="relative L2", cmap="magma", vmin=0,
                vmax=top[error],
            )  # fmt: skip
    figure.savefig(path)
    return path


def _top(parts: list[Doubles]) -> float:
    """One end of the colours for all schemes."""
    return max(1e-6, *(float(np.nanmax(x)) for x in parts))
