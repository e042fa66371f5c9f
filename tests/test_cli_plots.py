"""The demo's figure: a PNG of the stated size in which the two caches and the tiers can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mixkvq.cli.plots import demo_figure


@pytest.mark.parametrize("shape", [(30, 3, 64), (2, 1, 16), (40, 8, 128)])
def test_png(shape: tuple[int, int, int], tmp_path: Path) -> None:
    from matplotlib.image import imread

    trace = [(n, 4096 * n, 450 * n + 90_000) for n in range(1000, 5000, 128)]
    bits = np.random.default_rng(0).choice([1.0, 2, 3, 4, 8], size=shape)
    demo_figure(tmp_path / "demo.png", trace, bits, model="tiny", dtype="float32", preset="default")
    image = imread(tmp_path / "demo.png")
    height, width = image.shape[:2]
    assert (width, height) == (1680, 648)
    assert 20_000 < (tmp_path / "demo.png").stat().st_size < 3_000_000
    assert len(np.unique(image[:, width // 2 :].reshape(-1, image.shape[2]), axis=0)) > 5  # the colours of five tiers


def test_layers_without_packed_blocks_are_blank(tmp_path: Path) -> None:
    bits = np.full((4, 2, 16), np.nan)
    bits[1] = 3
    demo_figure(tmp_path / "a.png", [(1, 2, 1), (2, 4, 2)], bits, model="m", dtype="bfloat16", preset="compact")
    demo_figure(
        tmp_path / "b.png", [(1, 2, 1), (2, 4, 2)], np.full((4, 2, 16), np.nan), model="m", dtype="float32", preset="x"
    )
    assert (tmp_path / "a.png").stat().st_size > 10_000 < (tmp_path / "b.png").stat().st_size
