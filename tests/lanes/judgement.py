"""What `transformers_tests` found: outcomes of the runs, their comparison, and how both are printed."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

LAYERS = {"packed": "packed", "dequantized": "decoded", "not packed": "plain", "transformers' own": "theirs"}
"""Kinds of layers that `swapped_cache` counts, and their columns."""


@dataclass
class Run:
    """One run of one test file.

    Attributes
    ----------
    outcomes : dict
        ``CLASS::NAME`` of a test, or that and a subtest, to "passed", "failed" or "skipped", and what it said.
    trouble : str
        Why there are no outcomes; empty if there are.
    seconds : float
    swapped : dict
        What `swapped_cache` counted; empty with the stock cache.
    """

    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    trouble: str = ""
    seconds: float = 0.0
    swapped: dict[str, dict[str, int]] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """Tests and subtests with each outcome."""
        return Counter(outcome for outcome, _ in self.outcomes.values())

    def __str__(self) -> str:
        if self.trouble:
            return f"{'-':>6} {'-':>6} {'-':>7}"
        found = self.counts()
        return f"{found['passed']:6} {found['failed']:6} {found['skipped']:7}"


Results = dict[str, tuple[Run, Run]]
"""Test file to its runs with the stock cache and with ours."""


@dataclass(frozen=True)
class Difference:
    """A test that passes with the stock cache and not with ours; ``reason`` is empty unless that is expected."""

    test: str
    outcome: str
    message: str
    reason: str


def read_expected(file: Path) -> list[tuple[str, str]]:
    """Patterns of tests that may differ, with the reasons.

    Raises
    ------
    ValueError
        For an entry without a test or without a reason, or a file that is no TOML.
    OSError
        For a file that cannot be read.
    """
    entries = tomllib.loads(file.read_text()).get("difference", [])
    for entry in entries:
        if not entry.get("test") or not entry.get("reason"):
            raise ValueError(f"{file}: {entry} must have a test (a pattern) and a reason")
    return [(entry["test"], entry["reason"]) for entry in entries]


def compare(results: Results, expected: list[tuple[str, str]]) -> list[Difference]:
    """Tests that pass with the stock cache only."""
    found = []
    for file, (stock, ours) in results.items():
        for test, (outcome, _) in stock.outcomes.items():
            other, message = ours.outcomes.get(test, ("not run", ours.trouble))
            if outcome == "passed" != other:
                name = f"{file}::{test}"
                reason = next((why for pattern, why in expected if fnmatch(name, pattern)), "")
                found.append(Difference(name, other, message, reason))
    return found


def print_rows(files: list[str], results: Iterable[tuple[Run, Run]]) -> Iterator[tuple[Run, Run]]:
    """Print a line for every file as its runs end."""
    width = max(map(len, files))
    titles = f"{'passed':>6} {'failed':>6} {'skipped':>7}"
    print(f"{'':{width}}  {'with the stock cache':21}  {'with mixkvq':21}  layers")
    print(f"{'file':{width}}  {titles}  {titles}  {' '.join(f'{title:>7}' for title in LAYERS.values())}  seconds")
    for file, (stock, ours) in zip(files, results, strict=True):
        layers = " ".join(f"{ours.swapped.get('layers', {}).get(kind, 0):7}" for kind in LAYERS)
        print(f"{file:{width}}  {stock}  {ours}  {layers}  {stock.seconds + ours.seconds:7.0f}", flush=True)
        for name, run in (("stock cache", stock), ("mixkvq", ours)):
            if run.trouble:
                print(f"    {name}: {run.trouble}", flush=True)
        yield stock, ours


def print_verdict(results: Results, differences: list[Difference]) -> bool:
    """Print sums, differences and the verdict; whether it is good."""
    sums: dict[str, Counter[str]] = {"caches": Counter(), "layers": Counter(), "reasons": Counter()}
    for _, ours in results.values():
        for title, counts in ours.swapped.items():
            sums[title].update(counts)
    print()
    for index, name in enumerate(("stock cache", "mixkvq")):
        found = sum((runs[index].counts() for runs in results.values()), Counter())
        print(f"{name}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    print(f"caches made: {', '.join(f'{number} {kind}' for kind, number in sums['caches'].most_common())}")
    print("layers of these caches at the end of the tests:")
    for reason, number in sums["reasons"].most_common():
        print(f"  {number:6}  {reason}")
    for difference in differences:
        if not difference.reason:
            print(f"NOT EXPECTED: {difference.test}\n    {difference.outcome}: {difference.message}")
    for reason, number in Counter(difference.reason for difference in differences if difference.reason).items():
        print(f"expected in {number} tests, since {reason}, such as")
        print(f"    {next(difference.test for difference in differences if difference.reason == reason)}")
    for file, (stock, ours) in results.items():
        for test, (outcome, _) in stock.outcomes.items():
            if outcome == "failed" and ours.outcomes.get(test, ("",))[0] == "passed":
                print(f"passes with mixkvq only: {file}::{test}")
    broken = [
        file for file, runs in results.items() if any(run.trouble for run in runs) or not runs[0].counts()["passed"]
    ]
    if broken:
        print(f"not judged, since no test passes or a run broke off: {', '.join(broken)}")
    packed, wrong = sums["layers"]["packed"], sum(not difference.reason for difference in differences)
    if not packed:
        print("nothing was packed: these tests say nothing about mixkvq")
    good = not wrong and not broken and packed > 0
    expected = len(differences) - wrong
    print(
        f"verdict: {'good' if good else 'BAD'}: {wrong} unexpected and {expected} expected differences, "
        f"{packed} packed layers"
    )
    return good


def as_json(results: Results, differences: list[Difference]) -> dict[str, Any]:
    """All outcomes, differences and counts."""
    names = ("stock", "mixkvq")
    files = {file: {name: vars(run) for name, run in zip(names, runs, strict=True)} for file, runs in results.items()}
    return {"files": files, "differences": [vars(difference) for difference in differences]}
