"""The figure of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .study import Trial


def pareto_figure(path: Path, trials: Sequence[Trial], front: Sequence[Trial], chosen: Trial, title: str) -> None:
    """KL against true bits of all trials, the front and the chosen pair marked."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([t.true_bits for t in trials], [t.kl for t in trials], "o", color="#9ca3af", label="trials")
    axes.step([t.true_bits for t in front], [t.kl for t in front], "-o", where="post", color="#0f766e", label="best")
    axes.plot(chosen.true_bits, chosen.kl, "*", ms=16, color="#b45309", label="chosen")
    high, low = chosen.thresholds
    axes.annotate(f"({high:.2f}, {low:.2f})", (chosen.true_bits, chosen.kl), textcoords="offset points", xytext=(10, 8))
    axes.set(xlabel="true bits per number in the coded blocks", ylabel="KL to the exact cache, nats", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path)
