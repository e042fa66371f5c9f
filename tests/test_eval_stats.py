"""Intervals: by hand, against the normal law, and on many synthetic data sets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from mixkvq.eval import stats
from mixkvq.eval.stats import Interval, difference_interval, mean_interval, ratio_interval, stretches


def test_stretches_by_hand() -> None:
    x = np.arange(150.0)  # 64 + 64 + 22
    assert stretches([x, np.array([7.0])]).tolist() == [31.5, 95.5, 138.5, 7.0]


def test_mean_of_two_units_has_the_interval_of_its_four_resamples() -> None:
    """Resamples of (0, 1) have means 0, 1/2, 1/2, 1 with chances 1/4, 1/2, 1/4: 2.5 % and 97.5 % are 0 and 1."""
    assert mean_interval(np.array([0.0, 1.0])) == Interval(0.5, 0.0, 1.0)


def test_quantiles_of_a_small_sample_are_those_of_all_its_resamples() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    every = np.array([np.mean(picked) for picked in itertools.product(x, repeat=5)])  # all 3125, equally likely
    found = mean_interval(x)
    assert found.value == 6.2
    assert np.mean(every <= found.low) == pytest.approx(0.025, abs=0.01)
    assert np.mean(every <= found.high) == pytest.approx(0.975, abs=0.01)


def test_large_sample_agrees_with_the_normal_law() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    half = 1.96 * x.std() / math.sqrt(x.size)
    found = mean_interval(x)
    assert found.value == pytest.approx(x.mean())
    assert (found.value - found.low) / half == pytest.approx(1, abs=0.06)
    assert (found.high - found.value) / half == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("statistic", ["mean", "ratio"])
def test_coverage(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 data sets of 40 units, about 95 % have the truth inside: at least 91 % (3.6 standard errors below)."""
    monkeypatch.setattr(stats, "RESAMPLES", 399)
    r, inside = np.random.default_rng(1), 0
    for _ in range(400):
        y = r.gamma(4.0, 0.5, 40)  # mean 2
        if statistic == "mean":
            found, truth = mean_interval(y), 2.0
        else:
            found, truth = ratio_interval(0.7 * y * r.normal(1, 0.1, 40), y), 0.7
        inside += found.low <= truth <= found.high
    assert 0.91 * 400 <= inside <= 0.985 * 400


def test_pairing_narrows_a_ratio() -> None:
    r = np.random.default_rng(2)
    y = r.gamma(1.0, 1.0, 60)
    x = 0.8 * y + r.normal(0, 0.01, 60)
    paired, broken = ratio_interval(x, y), ratio_interval(r.permutation(x), y)
    assert paired.value == pytest.approx(broken.value)
    assert paired.low < 0.8 < paired.high
    assert (broken.high - broken.low) > 10 * (paired.high - paired.low)


def test_ratio_to_itself_is_exactly_one() -> None:
    x = np.random.default_rng(3).gamma(1.0, 1.0, 30)
    assert ratio_interval(x, x) == Interval(1.0, 1.0, 1.0)


def test_difference_is_of_pairs() -> None:
    y = np.array([1.0, 10.0, 100.0, 1000.0])
    assert difference_interval(y + 2, y) == Interval(2.0, 2.0, 2.0)
    assert difference_interval(y, y + 2).value == -2.0


def test_one_unit_has_no_interval() -> None:
    found = mean_interval(np.array([4.0]))
    assert found.value == 4.0 and math.isnan(found.low) and math.isnan(found.high)


def test_same_input_same_interval() -> None:
    x = np.random.default_rng(4).normal(size=20)
    assert mean_interval(x) == mean_interval(x.copy())


@pytest.mark.parametrize("interval", [ratio_interval, difference_interval])
def test_unpaired_units_are_refused(interval) -> None:
    with pytest.raises(ValueError, match="x has 3 units and y 4"):
        interval(np.ones(3), np.ones(4))
