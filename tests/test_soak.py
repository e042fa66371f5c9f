"""`make soak` sees what it is for: a line through memory, leaks that are seeded, turns that are the same twice."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from cache_file import own_path  # noqa: E402
from soak_memory import SPANS, census, slope  # noqa: E402

SCRIPT = Path(__file__).with_name("soak.py")


def soak(minutes: float, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**own_path(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", SCRIPT, "--minutes", str(minutes), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("rate", [0, 1000, 300_000])
def test_the_slope_of_noise_and_of_growth(rate):
    """Steps of an allocator that repeat for a while, which a fit through all points takes for certainty."""
    draw, covered = random.Random(0), 0
    times = [minute / 20 for minute in range(100)]
    for _ in range(200):
        noise = [level for _ in range(20) for level in [draw.gauss(0, 50_000)] * 5]
        found = slope(times, [4e8 + rate * at + wrong for at, wrong in zip(times, noise, strict=True)])
        covered += abs(found.rate - rate) <= found.margin
    assert covered >= 0.88 * 200, "the interval is to cover 95 % of the slopes"


def test_a_slope_needs_measurements():
    with pytest.raises(ValueError, match=f"11 measurements, must be {SPANS} at least"):
        slope(range(11), range(11))
    assert slope(range(24), [5.0] * 24).rate == 0


def test_the_census_counts_what_lives():
    before = census()
    kept = [torch.zeros(3), torch.nn.Parameter(torch.zeros(2))]
    assert (census() - before) == {"tensors": 2} and len(kept) == 2


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("leak", "message"), [("tensor", r" tensors more than after the first fifth"), ("handle", " handles, ")]
)
def test_a_seeded_leak_is_found(leak, message):
    done = soak(0.1, "--leak", leak)
    assert done.returncode == 1 and message in done.stdout, done.stdout + done.stderr


@pytest.mark.exhaustive
@pytest.mark.slow
def test_memory_that_no_object_holds_is_found():
    done = soak(0.5, "--leak", "memory")
    assert done.returncode == 1 and "soak: memory grows by" in done.stdout, done.stdout + done.stderr
