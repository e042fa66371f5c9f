"""The table of families and scenarios, from the reports of a test run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

FAILS = "DynamicCache fails too: "
MARKS = "<!-- table of make matrix -->", "<!-- end of table -->"


@dataclass
class Row:
    """What became of one family."""

    attention: set[str] = field(default_factory=set)
    paths: dict[str, str] = field(default_factory=dict)  # seen in the run, by attention
    tried: set[str] = field(default_factory=set)  # scenarios
    outcomes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # tests by outcome
    without: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # scenarios skipped, by reason

    @property
    def path(self) -> str:
        """One for all attention implementations, or each with its own; a dash where none was seen."""
        if len(set(self.paths.values())) < 2:
            return next(iter(self.paths.values()), "-")
        return "; ".join(f"{attention}: {path}" for attention, path in sorted(self.paths.items()))


class Table:
    """Rows by family."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = defaultdict(Row)
        self.samples: dict[str, set[str]] = defaultdict(set)  # families by scenario that was not tried on all of them
        self.scenarios: set[str] = set()

    @classmethod
    def of(cls, stats: dict[str, list[Any]]) -> Table:
        """From the statistics of pytest's terminal reporter."""
        table = cls()
        for outcome in ("passed", "failed", "error", "skipped"):
            for report in stats.get(outcome, ()):
                about = dict(getattr(report, "user_properties", ()))
                if "family" not in about:
                    continue
                row = table.rows[about["family"]]
                if "sample" in about:
                    table.samples[about["sample"]].add(about["family"])
                row.attention.add(about["attention"])
                if "path" in about:
                    row.paths[about["attention"]] = shorten(about["path"])
                row.outcomes[outcome].add(report.nodeid)
                scenario = report.nodeid.rpartition("-")[2].rstrip("]")
                table.scenarios.add(scenario)
                row.tried.add(scenario)
                if outcome == "skipped":
                    row.without[str(report.longrepr[2]).removeprefix("Skipped: ")].add(scenario)
        return table

    def markdown(self) -> str:
        """A Markdown table in alphabetical order, and notes on the scenarios that do not apply."""
        lines = [
            "| family | attention | path of its layers | passed | failed | does not apply |",
            "|---|---|---|--:|--:|---|",
        ]
        notes: dict[str, int] = {}
        for name, row in sorted(self.rows.items()):
            numbers = [notes.setdefault(note, len(notes) + 1) for note in self._notes(row)]
            cells = (
                name,
                ", ".join(sorted(row.attention)),
                row.path,
                str(len(row.outcomes["passed"])),
                str(len(row.outcomes["failed"] | row.outcomes["error"])),
                f"note{'s' * (len(numbers) > 1)} {listed(map(str, sorted(numbers)))}" if numbers else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
        if notes:
            lines += [
                "",
                "Scenarios that do not apply; in quotes, the error with which `DynamicCache` fails there:",
                "",
            ]
            lines += [f"{number}. {note}" for note, number in notes.items()]
        if self.samples:
            lines += ["", self._sampled()]
        return "\n".join(lines)

    def _notes(self, row: Row) -> list[str]:
        """One for every reason why scenarios do not apply."""
        scenarios: dict[str, set[str]] = defaultdict(set)
        for reason, names in row.without.items():
            scenarios[brief(reason)] |= names
        return [
            f"{'everything' if names == row.tried else ', '.join(abridged(names, self.scenarios))}: {reason}"
            for reason, names in scenarios.items()
        ]

    def _sampled(self) -> str:
        """What was not tried on every family, scenarios with the same families together."""
        scenarios: dict[str, list[str]] = defaultdict(list)
        for name, families in sorted(self.samples.items()):
            scenarios[listed(sorted(families))].append(name)
        tried = "; ".join(f"{listed(names)} on {families}" for families, names in scenarios.items())
        return f"What does not depend on the family was tried on a few of them: {tried}."

    def write(self, file: Path) -> None:
        """Replace what a Markdown file has between `MARKS`."""
        begin, end = MARKS
        before, found, rest = file.read_text().partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"--table is {file}, must be a file with the lines {begin} and {end}")
        file.write_text(f"{before}{begin}\n\n{self.markdown()}\n\n{end}{after}")


def shorten(path: str) -> str:
    """``packed packed native`` as ``2 packed, 1 native``, in the order of the layers."""
    return " or ".join(
        ", ".join(f"{len(list(group))} {name}" for name, group in groupby(one.split())) for one in path.split(" or ")
    )


def listed(names: Iterable[str]) -> str:
    """As in "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def abridged(names: set[str], every: set[str]) -> list[str]:
    """Names in order, and ``beginning_*`` for at least three that are all of those in ``every`` which begin so."""
    left, short = sorted(names), []
    while left:
        words, together = left[0].split("_"), {left[0]}
        for count in range(2, len(words)):
            begun = {name for name in every if name.startswith("_".join(words[:count]) + "_")}
            if len(begun) >= 3 and begun <= names:
                together = begun
                words = [*words[:count], "*"]
                break
        left = [name for name in left if name not in together]
        short.append("_".join(words))
    return short


def brief(reason: str) -> str:
    """Of an error of the stock cache its first sentence, quoted, without numbers that change from case to case."""
    error = reason.removeprefix(FAILS)
    if error == reason:
        return reason
    sentence = re.split(r"\.(?=\s|[A-Z])", error)[0]
    return f"`{re.sub(r'(?<![a-zA-Z_.])[0-9]+', 'N', sentence).replace('`', chr(39))}`"
